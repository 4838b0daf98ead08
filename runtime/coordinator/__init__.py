"""The coordinator of a pipeline, in the caller's process.

Pure, in the order in which the files build on each other: events, reach, counters, node_record, refusals, roster,
links, deadlines, diagnosis, request_record, requests, pipeline_phase, state, interpreter, failure_detector. With
effects: inbox, answers, data_links, request_io, results, status, setup, node_controller, node_monitor, loop.
"""
