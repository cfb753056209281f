"""The experiments of the MRD paper (arXiv:2504.06658) over again: does what it says of MRD hold?"""
