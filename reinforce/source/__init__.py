"""Where samples come from: tars, Parquet, jsonl, csv, folders of images, reinforced datasets."""
