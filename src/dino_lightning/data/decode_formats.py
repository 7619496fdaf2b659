"""The chain of pages in a TIFF, followed before a library does that would follow it for ever."""

MOST_PAGES = 10_000
"""More are a damaged file, or no image."""


def check_pages(content: bytes) -> None:
    """Raise `ValueError` where the pages of a TIFF lead back to one of them, or are more than `MOST_PAGES`.

    A page is a directory: the number of its entries, the entries, and where the next directory begins.
    """
    order = "little" if content.startswith(b"II") else "big"
    big = content[2:4] in (b"+\0", b"\0+")  # BigTIFF: 64-bit offsets
    number, entry, offset = (8, 20, 8) if big else (2, 12, 4)

    def integer(at: int, length: int) -> int:
        return int.from_bytes(content[at : at + length], order)

    seen: set[int] = set()
    at = integer(8 if big else 4, offset)
    while 0 < at < len(content):
        if at in seen:
            raise ValueError("its pages lead back to one of them")
        if len(seen) == MOST_PAGES:
            raise ValueError(f"more than {MOST_PAGES} pages")
        seen.add(at)
        at = integer(at + number + integer(at, number) * entry, offset)
