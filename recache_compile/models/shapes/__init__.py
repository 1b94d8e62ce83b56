"""A small FLUX pipeline that draws two coloured shapes from a caption."""
