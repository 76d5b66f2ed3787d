"""From a file or a hub to typed examples, each module standing on those above it.

table      what every format shares: the table, the file, its bytes and lines
delimited, json_rows, parquet
           one format (or kin) each
folders    which files of a folder or hub snapshot belong to which split
sources    path or hub id -> tables
issues     rows that were not used as they stood
columns    which column is what
examples   LabeledText, RankGroup, Task
cells      a cell -> text, number, labels
dates      a cell -> a date that sorts
events     a row an impression -> a row a title
clicks     click log -> RankGroup
groups     titles that compete -> RankGroup, from clicks, grades or pairs
schema     table -> examples
splits     seeded, stratified, group-safe, or by date
allocation whether chance dealt out the impressions
audit      duplicates, conflicts, leaks, counted
demo       the embedded data
"""
