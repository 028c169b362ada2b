"""Files of others, whatever the survey: listed, opened and read with distrust.

- `places`: a folder, one file, a list, an archive or a bucket, all listed and opened alike.
- `fits`: binary tables and images of FITS files.
- `kept`: the FITS file that was read last, left open for the next run of its rows.
- `headers`: the headers of FITS files.
- `parquet`: Parquet files in runs of rows.
- `tables`: tables of any format as plain Arrow.
"""
