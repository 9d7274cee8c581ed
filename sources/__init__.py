"""Where images come from: one file for each way of storing them. The table of the data sets is in `datasets.py`."""
