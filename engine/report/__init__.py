"""What a user takes away from a run: one HTML page and one CSV file.

Charts are plotly.js figures (data and layout as plain JSON); the page holds its own copy of the library, and needs no
network. Colours are named after CSS variables of the page, which has a light and a dark set of them.
"""
