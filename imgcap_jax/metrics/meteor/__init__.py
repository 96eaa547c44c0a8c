"""METEOR 1.5 for English (Denkowski and Lavie, 2014) in numpy, equal to the official Java tool."""
