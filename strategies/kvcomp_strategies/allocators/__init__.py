"""Budget allocators: how many slots each head gets."""
