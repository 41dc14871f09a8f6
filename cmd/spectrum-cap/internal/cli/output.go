package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"sigs.k8s.io/yaml"

	"spectrum-os.org/broker/broker/api"
)

// plain is text from elsewhere as it may stand on a terminal: what is not a
// visible character is spelt out.
func plain(s string) string {
	if strings.IndexFunc(s, unsafeRune) < 0 && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unsafeRune(r) {
			fmt.Fprintf(&b, `\u%04x`, r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// unsafeRune tells runes that drive a terminal: C0 and C1 controls, and what
// reorders or ends a line.
func unsafeRune(r rune) bool {
	return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' ||
		(r >= '\u202a' && r <= '\u202e') || (r >= '\u2066' && r <= '\u2069')
}

// print writes the answer: v as JSON or YAML, or what table writes.
func (a *app) print(v any, table func(w io.Writer)) error {
	out, err := a.render(v, table)
	if err != nil {
		return err
	}
	if _, err := a.host.Stdout.Write(out); err != nil {
		return fmt.Errorf("cannot write the answer: %w", err)
	}
	return nil
}

func (a *app) render(v any, table func(w io.Writer)) ([]byte, error) {
	var b bytes.Buffer
	if a.output == "table" {
		table(&b)
		return b.Bytes(), nil
	}
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("cannot encode the answer: %w", err)
	}
	out := escapeJSON(b.Bytes())
	if a.output == "yaml" {
		return toYAML(out)
	}
	return out, nil
}

// printOne writes one of a stream of answers: a line of JSON, or a YAML
// document of its own.
func (a *app) printOne(v any, line func() string) error {
	var out []byte
	if a.output == "table" {
		out = []byte(line() + "\n")
	} else {
		b, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("cannot encode the answer: %w", err)
		}
		if out = append(escapeJSON(b), '\n'); a.output == "yaml" {
			if b, err = toYAML(out); err != nil {
				return fmt.Errorf("cannot encode the answer: %w", err)
			}
			out = append([]byte("---\n"), b...)
		}
	}
	if _, err := a.host.Stdout.Write(out); err != nil {
		return fmt.Errorf("cannot write the answer: %w", err)
	}
	return nil
}

// toYAML converts escaped JSON. The library does not escape every rune that a
// terminal acts upon; where such are left, JSON is YAML too.
func toYAML(escaped []byte) ([]byte, error) {
	out, err := yaml.JSONToYAML(escaped)
	if err == nil && hasUnsafe(out) {
		return escaped, nil
	}
	return out, err
}

func hasUnsafe(b []byte) bool {
	return bytes.IndexFunc(b, func(r rune) bool { return unsafeRune(r) && r != '\n' }) >= 0
}

// escapeJSON spells out runes that JSON lets stand in strings and terminals
// act upon. Outside of strings there are none but line ends.
func escapeJSON(b []byte) []byte {
	if !hasUnsafe(b) {
		return b
	}
	var out bytes.Buffer
	for _, r := range string(b) {
		if unsafeRune(r) && r != '\n' {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}

// A table is lines of cells, shown as columns.
type table struct {
	head  []string
	rows  [][]string
	paint func(column int, text string) string // may be nil
}

func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = plain(cells[i])
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

func (t *table) write(w io.Writer) {
	widths := make([]int, len(t.head))
	for _, row := range append([][]string{t.head}, t.rows...) {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	line := func(row []string, paint func(int, string) string) {
		var b strings.Builder
		for i, c := range row {
			shown := c
			if paint != nil {
				shown = paint(i, c)
			}
			b.WriteString(shown)
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		_, _ = fmt.Fprintln(w, b.String())
	}
	line(t.head, nil)
	for _, row := range t.rows {
		line(row, t.paint)
	}
}

// facts are names and values, one a line.
type facts [][2]string

// add leaves out what is empty.
func (f *facts) add(name, value string) {
	if value != "" {
		*f = append(*f, [2]string{name, plain(value)})
	}
}

func (f facts) write(w io.Writer) {
	width := 0
	for _, line := range f {
		width = max(width, len(line[0]))
	}
	for _, line := range f {
		name := line[0]
		if name != "" {
			name += ":"
		}
		_, _ = fmt.Fprintf(w, "%-*s  %s\n", width+1, name, line[1])
	}
}

// colour tells whether stdout is to have any (no-color.org).
func (a *app) colour() bool {
	_, ok := terminal(a.host.Stdout)
	return ok && a.host.Getenv("NO_COLOR") == "" && a.host.Getenv("TERM") != "dumb"
}

// stateColumn paints the states in one column.
func (a *app) stateColumn(column int) func(int, string) string {
	if !a.colour() {
		return nil
	}
	colours := map[string]string{
		"active": "32", "running": "32", "loaded": "32",
		"pending": "33", "starting": "33", "stopping": "33", "revoking": "33", "stale": "33",
		"degraded": "31", "failed": "31", "none": "31",
	}
	return func(i int, text string) string {
		if c, ok := colours[text]; ok && i == column {
			return "\x1b[" + c + "m" + text + "\x1b[0m"
		}
		return text
	}
}

// short shortens identifiers to the digits that tell those shown apart, at
// least the 8 that the broker takes.
func (a *app) short(ids []uuid.UUID) func(uuid.UUID) string {
	n := 8
	if a.full {
		n = 36
	}
	seen := map[string]uuid.UUID{}
	for i := 0; i < len(ids); i++ {
		key := ids[i].String()[:n]
		if other, taken := seen[key]; taken && other != ids[i] && n < 36 {
			n++
			clear(seen)
			i = -1
			continue
		}
		seen[key] = ids[i]
	}
	return func(id uuid.UUID) string {
		s := id.String()[:n]
		return strings.TrimSuffix(s, "-")
	}
}

// ends tells in how long, or with what, a grant ends.
func (a *app) ends(g api.Grant) string {
	switch {
	case g.Expires != nil:
		return a.until(*g.Expires)
	case g.Persist:
		return "when revoked"
	}
	return "with the VM's exit"
}

// until tells how long it is until then.
func (a *app) until(t time.Time) string {
	left := t.Sub(a.now()).Round(time.Second)
	if left <= 0 {
		return "passed"
	}
	return "in " + shortDuration(left)
}

func stamp(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

func shortDuration(d time.Duration) string {
	if d >= 48*time.Hour {
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
