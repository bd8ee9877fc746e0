"""Files and folders: written whole, taken possession of, and read from whoever made them.

This package imports nothing else of emf, and neither torch nor Pillow before a function needs it. What its functions
raise is a ValueError of one line that names the file.
"""

from emf.files.claims import SETTINGS, check_claim, check_folder, claim, write_settings
from emf.files.decoding import FORMATS, BrokenImage, image_size, open_image
from emf.files.fields import filled, fits, misfit, read_fields
from emf.files.locks import alone
from emf.files.reading import (
    check_readable,
    check_text,
    decode_text,
    files_in,
    numbered_jsonl,
    numbered_lines,
    parse_json,
    place_or_name,
    read_bytes,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_object,
    read_text,
    whole_path,
    why,
)
from emf.files.rows import append_rows, mend_rows, read_rows, write_rows
from emf.files.writing import (
    check_writable,
    copy_file,
    copy_folder,
    finite,
    make_folder,
    refuse_existing,
    whole_file,
    whole_folder,
    write_json,
    write_text,
    written,
)

__all__ = [
    "FORMATS",
    "SETTINGS",
    "BrokenImage",
    "alone",
    "append_rows",
    "check_claim",
    "check_folder",
    "check_readable",
    "check_text",
    "check_writable",
    "claim",
    "copy_file",
    "copy_folder",
    "decode_text",
    "filled",
    "files_in",
    "finite",
    "image_size",
    "fits",
    "make_folder",
    "mend_rows",
    "misfit",
    "numbered_jsonl",
    "numbered_lines",
    "open_image",
    "parse_json",
    "place_or_name",
    "read_bytes",
    "read_csv",
    "read_fields",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_object",
    "read_rows",
    "read_text",
    "refuse_existing",
    "whole_file",
    "whole_folder",
    "whole_path",
    "why",
    "write_json",
    "write_rows",
    "write_settings",
    "write_text",
    "written",
]
