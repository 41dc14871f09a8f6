package main

import (
	"bytes"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// pictures say what each one shows.
var pictures = []struct{ name, title, axis, unit string }{
	{answers, "What somebody waits for", "microseconds", "µs"},
	{wholes, "What is done to all of it", "milliseconds", "ms"},
	{sizes, "What it takes", "megabytes", "MB"},
}

// palette is one that people with any kind of sight can tell apart (Okabe and Ito).
var palette = []color.RGBA{
	{0, 0, 0, 255},
	{230, 159, 0, 255},
	{86, 180, 233, 255},
	{0, 158, 115, 255},
	{0, 114, 178, 255},
	{213, 94, 0, 255},
	{204, 121, 167, 255},
	{120, 120, 120, 255},
}

// draw writes one SVG for each picture into dir.
func (s *scaling) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, picture := range pictures {
		p := plot.New()
		p.Title.Text = picture.title
		p.X.Label.Text, p.Y.Label.Text = "live tokens", picture.axis
		p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
		p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, plot.LogTicks{Prec: -1}
		p.Add(plotter.NewGrid())
		p.Legend.Top, p.Legend.Left = true, true
		p.Legend.YOffs = vg.Points(-4)
		n := 0
		low, high := 0.0, 0.0
		for _, l := range s.lines {
			if l.picture != picture.name {
				continue
			}
			var points plotter.XYs
			for _, tokens := range s.tokens {
				y, measured := l.at[tokens]
				if !measured {
					continue
				}
				points = append(points, plotter.XY{X: float64(tokens), Y: y})
				if low == 0 || y < low {
					low = y
				}
				high = max(high, y)
			}
			line, marks, err := plotter.NewLinePoints(points)
			if err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
			line.Color, marks.Color = palette[n%len(palette)], palette[n%len(palette)]
			line.Width = vg.Points(1.5)
			marks.Shape = []draw.GlyphDrawer{draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}}[n/len(palette)%3]
			p.Add(line, marks)
			p.Legend.Add(l.what, line, marks)
			n++
		}
		// Room above for what the lines are.
		p.Y.Min, p.Y.Max = low/1.5, high*1.5
		for range n {
			p.Y.Max *= 1.9
		}
		if err := p.Save(16*vg.Centimeter, 14*vg.Centimeter, filepath.Join(dir, picture.name+".svg")); err != nil {
			return err
		}
	}
	return nil
}

// table is all the figures in Markdown.
func (s *scaling) table() string {
	var b strings.Builder
	for _, picture := range pictures {
		fmt.Fprintf(&b, "![%s](performance/%s.svg)\n\n| %s, %s |", picture.title, picture.name, strings.ToLower(picture.title), picture.unit)
		for _, n := range s.tokens {
			fmt.Fprintf(&b, " %s |", thousands(n))
		}
		b.WriteString("\n|---|" + strings.Repeat("---:|", len(s.tokens)) + "\n")
		for _, l := range s.lines {
			if l.picture != picture.name {
				continue
			}
			fmt.Fprintf(&b, "| %s |", l.what)
			for _, n := range s.tokens {
				text := "–"
				if y, measured := l.at[n]; measured {
					text = figure(y)
				}
				fmt.Fprintf(&b, " %s |", text)
			}
			b.WriteString("\n")
		}
		b.WriteString("\n")
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// figure has three digits that count.
func figure(v float64) string {
	if v >= 1000 {
		return thousands(int(v + 0.5))
	}
	return fmt.Sprintf("%.3g", v)
}

func thousands(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// The generated part of a document lies between these lines.
const (
	beginTable = "<!-- made by make plots: begin -->\n"
	endTable   = "<!-- made by make plots: end -->\n"
)

// intoDocument puts the table where a document has its marks.
func (s *scaling) intoDocument(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(text, []byte(beginTable))
	_, after, ended := bytes.Cut(rest, []byte(endTable))
	if !ok || !ended {
		return fmt.Errorf("%s has no place for the table: it wants a line %q and a later one %q", path, strings.TrimSpace(beginTable), strings.TrimSpace(endTable))
	}
	out := bytes.Join([][]byte{before, []byte(beginTable), []byte("\n" + s.table() + "\n"), []byte(endTable), after}, nil)
	return os.WriteFile(path, out, 0o644)
}
