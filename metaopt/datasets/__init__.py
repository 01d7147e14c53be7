"""Small real data sets for examples, as NumPy arrays."""

from .._core._files import DataError as DataError
from ._class_data import ClassData as ClassData
from ._digits import load_digits as load_digits
from ._fashion_mnist import load_fashion_mnist as load_fashion_mnist
from ._image_data import ImageData as ImageData, k_fold as k_fold, split as split
from ._image_folder import load_image_folder as load_image_folder
from ._mnist import load_mnist as load_mnist
from ._omniglot import load_omniglot as load_omniglot
from ._text_data import TextData as TextData
from ._tiny_shakespeare import load_tiny_shakespeare as load_tiny_shakespeare
