"""The one data path: a flat gradient in, the averaged gradient out."""
