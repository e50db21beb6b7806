"""What four bits stand for in the types that look them up: whole numbers, to be scaled."""

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)     # IQ4_NL, IQ4_XS: closest around zero
HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)      # MXFP4: twice its numbers, of which one bit is a fraction's
