"""Pictures as files hold them, and folders as bytes."""

import io


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
