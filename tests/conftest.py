import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
