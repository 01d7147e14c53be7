"""Small real data sets for examples, as NumPy arrays."""

from .._core._files import DataError as DataError
from ._cifar10 import load_cifar10_subset as load_cifar10_subset
from ._class_data import ClassData as ClassData
from ._corrupt_labels import corrupt_labels as corrupt_labels
from ._digits import load_digits as load_digits
from ._fashion_mnist import load_fashion_mnist as load_fashion_mnist
from ._image_data import ImageData as ImageData
from ._image_folder import load_image_folder as load_image_folder
from ._mnist import load_mnist as load_mnist
from ._omniglot import load_omniglot as load_omniglot
from ._sparse_data import SparseData as SparseData
from ._sparse_sets import load_newsgroups as load_newsgroups, load_sector as load_sector
from ._split import k_fold as k_fold, split as split
from ._table_data import TableData as TableData
from ._tables import (
    load_a9a as load_a9a,
    load_covertype_subset as load_covertype_subset,
    load_ijcnn1 as load_ijcnn1,
)
from ._text_data import TextData as TextData
from ._tiny_shakespeare import load_tiny_shakespeare as load_tiny_shakespeare
from ._token_data import TokenData as TokenData
from ._wikitext2 import load_wikitext2_parts as load_wikitext2_parts
