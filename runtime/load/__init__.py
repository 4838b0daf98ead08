"""Sends load to a server or a pipeline, and measures how it answers.

patterns.py    when requests start: at a rate, or as many at once           pure
histogram.py   percentiles of any number of times in bounded memory         pure
windows.py     the figures of one load, window by window; the stability rule pure
driver.py      which requests start now, and what their ends mean           pure
loop.py        one event loop that performs it against a target
target.py      what a load is sent to; pipeline.py is a pipeline in this process
"""
