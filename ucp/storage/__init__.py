"""Bytes on disk: where they lie, how they are read, checked and written. No torch is needed by any module here."""
