"""What is told of the machine."""

from benchmarks import measure


def test_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    assert measure.commit() == "0123456789ab"
    monkeypatch.delenv("COMMIT")
    assert measure.commit() == "unknown"
