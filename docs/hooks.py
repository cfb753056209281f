"""The results that pages link to are beside them in what is built."""

from pathlib import Path

from mkdocs.structure.files import File

FOLDERS = ("benchmarks/results", "examples/results")


def on_files(files, config):
    root = Path(config.docs_dir).parent
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                source = path.relative_to(root).as_posix()
                files.append(File(source, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, **_):
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}", f"]({folder}")
    return markdown
