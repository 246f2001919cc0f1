"""Types of arrays that several modules share.

Axis letters in `nn` and `ops`: B batch, T flow blocks, N tokens, d channels of a token, K mixture
components, S streams of labels, H W C image.
"""

from jaxtyping import Array, Float, Int, UInt8

Images = UInt8[Array, 'B H W C']  # gray levels
Values = Float[Array, 'B H W C']  # real-valued images, mostly in [-1, 1]
Labels = Int[Array, 'B']
Tokens = Float[Array, 'B N d']
Hidden = Float[Array, 'B N width']  # hidden states of a transformer
Condition = Float[Array, 'B width'] | None  # class embeddings, added to each embedded token
PerImage = Float[Array, 'B']
PerToken = Float[Array, 'B N']
PerBlock = Float[Array, 'T B']
Scalar = Float[Array, ''] | float  # may be traced
Index = Int[Array, ''] | int  # may be traced
