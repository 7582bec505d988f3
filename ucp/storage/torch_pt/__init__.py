"""torch's own files, read and laid out without torch: archives, pickles by an allow-list, tensors as byte ranges."""
