"""The data of the program: one file for each source, codecs, and examples in batches."""

from revnet.app.data.codecs import FIRST_BYTE as FIRST_BYTE
from revnet.app.data.codecs import FIRST_WORD as FIRST_WORD
from revnet.app.data.codecs import PAD as PAD
from revnet.app.data.codecs import START as START
from revnet.app.data.codecs import Array as Array
from revnet.app.data.codecs import Patches as Patches
from revnet.app.data.codecs import Words as Words
from revnet.app.data.codecs import image_codecs as image_codecs
from revnet.app.data.codecs import split_words as split_words
from revnet.app.data.examples import Data as Data
from revnet.app.data.examples import Images as Images
from revnet.app.data.examples import split as split
from revnet.app.data.examples import step_batch as step_batch
