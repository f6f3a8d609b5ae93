"""Views: samples of a dataset that are chosen by rules, from what is stored of them."""
