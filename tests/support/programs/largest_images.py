"""Decodes images of the largest allowed size. Prints time and memory, and checks the memory.

python -m tests.support.programs.largest_images
"""

import resource
import time

from farmer_jax.data import images
from tests.support import data as data_lib

SIDE = 11_584

if __name__ == '__main__':
  for depth, color, bytes_per_pixel in ((8, 0, 1), (16, 0, 2), (8, 3, 1), (8, 2, 3), (8, 6, 4)):
    zeros = data_lib.compressed_zeros((bytes_per_pixel * SIDE + 1) * SIDE)
    content = data_lib.png_of_pixel_data(SIDE, SIDE, depth, color, zeros)
    start = time.monotonic()
    assert images.decode(content, 256, 3).shape == (256, 256, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f'{depth=} {color=} {time.monotonic() - start:.1f} s {peak:.2f} GiB')
    assert peak < 1.6, peak
