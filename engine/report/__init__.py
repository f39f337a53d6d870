"""The report of a run: one HTML page and one CSV file.

Charts are plotly.js figures (data and layout as plain JSON). The page includes the library and needs no network. Its
colours are CSS variables, with a light and a dark set.
"""
