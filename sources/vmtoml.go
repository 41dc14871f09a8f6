package sources

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// Bounds of vm.toml.
const (
	MaxVMToml     = 64 << 10
	MaxLine       = 1024 // of vm.toml; keeps dotted keys and nesting shallow
	MinMemoryMiB  = 16
	MaxMemoryMiB  = 1 << 20
	MaxVCPUs      = 254
	MaxLabels     = 64
	MaxLabelBytes = 256
	MaxGrants     = 128
	MaxSpelling   = 8192

	DefaultMemoryMiB = 512
	DefaultVCPUs     = 1
)

// vmConfig is what vm.toml says.
type vmConfig struct {
	MemoryMiB int
	VCPUs     int
	Role      string
	Labels    map[string]string
	Template  bool
	Grants    []DeclaredGrant
}

// lineError is an error at a line of a file; line 0 is the whole file.
type lineError struct {
	line int
	err  error
}

func (e *lineError) Error() string {
	if e.line == 0 {
		return e.err.Error()
	}
	return fmt.Sprintf("line %d: %s", e.line, e.err)
}

func (e *lineError) Unwrap() error { return e.err }

var (
	roleForm  = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	keyForm   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$`)
	labelForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`) // as the agent takes it
	typeError = regexp.MustCompile(`(?s)^toml: line (\d+) \(last key "(.*?)"\): (.*)$`)
	grantLine = regexp.MustCompile(`(?m)^[ \t]*\[\[[ \t]*grant[ \t]*\]\]`)
)

// decodeVMToml reads a vm.toml strictly: an unknown key, a wrong type and a
// value out of bounds are errors, a *lineError wherever the line is known.
func decodeVMToml(src []byte) (vmConfig, error) {
	c := vmConfig{MemoryMiB: DefaultMemoryMiB, VCPUs: DefaultVCPUs, Role: RoleApp}
	if len(src) > MaxVMToml {
		return vmConfig{}, fmt.Errorf("%w: at most %d bytes", ErrTooLarge, MaxVMToml)
	}
	if !utf8.Valid(src) {
		return vmConfig{}, fmt.Errorf("%w: it is not UTF-8", ErrContents)
	}
	n := 0
	for line := range bytes.SplitSeq(src, []byte("\n")) {
		if n++; len(line) > MaxLine {
			return vmConfig{}, &lineError{n, fmt.Errorf("%w: a line has at most %d bytes", ErrTooLarge, MaxLine)}
		}
	}
	var top map[string]toml.Primitive
	md, err := toml.Decode(string(src), &top)
	if err != nil {
		return vmConfig{}, tomlError(err)
	}
	f := fields{md: &md, in: top}
	f.take("memory_mib", &c.MemoryMiB)
	f.take("vcpus", &c.VCPUs)
	f.take("role", &c.Role)
	f.take("labels", &c.Labels)
	f.take("template", &c.Template)
	var grants []map[string]toml.Primitive
	f.take("grant", &grants)
	if err := f.finish(); err != nil {
		return vmConfig{}, err
	}
	if err := c.check(); err != nil {
		return vmConfig{}, f.at(err)
	}
	if len(grants) > MaxGrants {
		return vmConfig{}, fmt.Errorf("%w: at most %d [[grant]]", ErrTooMany, MaxGrants)
	}
	lines := grantLines(src, len(grants))
	for i, g := range grants {
		d, err := decodeGrant(&md, g)
		if err != nil {
			// What the library knows of a line in an array of tables is
			// that of the last element.
			var at *lineError
			if errors.As(err, &at) {
				err = at.err
			}
			return vmConfig{}, &lineError{lines(i), fmt.Errorf("[[grant]] %d: %w", i+1, err)}
		}
		c.Grants = append(c.Grants, d)
	}
	return c, nil
}

func decodeGrant(md *toml.MetaData, in map[string]toml.Primitive) (DeclaredGrant, error) {
	var d DeclaredGrant
	var ttl string
	f := fields{md: md, in: in}
	f.take("capability", &d.Capability)
	f.take("ttl", &ttl)
	f.take("label", &d.Label)
	if err := f.finish(); err != nil {
		return d, err
	}
	switch {
	case d.Capability == "":
		return d, fmt.Errorf("%w: it needs a capability", ErrContents)
	case len(d.Capability) > MaxSpelling:
		return d, fmt.Errorf("%w: a capability has at most %d bytes", ErrTooLarge, MaxSpelling)
	case !printable(d.Capability):
		return d, fmt.Errorf("%w: the capability has control characters", ErrContents)
	case d.Label != "" && !labelForm.MatchString(d.Label):
		return d, fmt.Errorf("%w: the label %s is not of the form %s", ErrContents, shown(d.Label), labelForm)
	}
	if ttl != "" {
		t, err := time.ParseDuration(ttl)
		if err != nil || t < time.Second || t%time.Second != 0 {
			return d, fmt.Errorf(`%w: ttl %s is not whole seconds, such as "90s" or "1h"`, ErrContents, shown(ttl))
		}
		d.TTLSeconds = int64(t / time.Second)
	}
	return d, nil
}

// keyedError is an error about the value of a key.
type keyedError struct {
	key string
	err error
}

func (e *keyedError) Error() string { return e.key + ": " + e.err.Error() }
func (e *keyedError) Unwrap() error { return e.err }

func (c vmConfig) check() error {
	bad := func(key, format string, args ...any) error {
		return &keyedError{key, fmt.Errorf("%w: "+format, append([]any{ErrContents}, args...)...)}
	}
	switch {
	case c.MemoryMiB < MinMemoryMiB || c.MemoryMiB > MaxMemoryMiB:
		return bad("memory_mib", "%d is not from %d to %d", c.MemoryMiB, MinMemoryMiB, MaxMemoryMiB)
	case c.VCPUs < 1 || c.VCPUs > MaxVCPUs:
		return bad("vcpus", "%d is not from 1 to %d", c.VCPUs, MaxVCPUs)
	case !roleForm.MatchString(c.Role):
		return bad("role", "%s is not of the form %s", shown(c.Role), roleForm)
	case len(c.Labels) > MaxLabels:
		return bad("labels", "at most %d", MaxLabels)
	}
	for k, v := range c.Labels {
		if !keyForm.MatchString(k) {
			return bad("labels", "%s is not of the form %s", shown(k), keyForm)
		}
		if len(v) > MaxLabelBytes || !printable(v) {
			return bad("labels", "the value of %s is longer than %d bytes or has control characters", k, MaxLabelBytes)
		}
	}
	return nil
}

// fields takes the values of a table's known keys out of it.
type fields struct {
	md    *toml.MetaData
	in    map[string]toml.Primitive
	known []string
	err   error
}

func (f *fields) take(key string, into any) {
	f.known = append(f.known, key)
	if p, ok := f.in[key]; ok && f.err == nil {
		f.err = tomlError(f.md.PrimitiveDecode(p, into))
	}
}

// finish refuses what is left.
func (f *fields) finish() error {
	if f.err != nil {
		return f.err
	}
	var unknown []string
	for k := range f.in {
		if !slices.Contains(f.known, k) {
			unknown = append(unknown, k)
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	slices.Sort(unknown)
	slices.Sort(f.known)
	return f.at(&keyedError{unknown[0], fmt.Errorf("%w: unknown key; known are %s", ErrContents, strings.Join(f.known, ", "))})
}

// at finds the line of a keyedError: only a failed decoding tells it.
func (f *fields) at(err error) error {
	var keyed *keyedError
	if !errors.As(err, &keyed) {
		return err
	}
	shownErr := fmt.Errorf("%s: %w", shown(keyed.key), keyed.err)
	if p, ok := f.in[keyed.key]; ok {
		var parse toml.ParseError
		if errors.As(f.md.PrimitiveDecode(p, &refuser{}), &parse) {
			return &lineError{parse.Position.Line, shownErr}
		}
	}
	return shownErr
}

type refuser struct{}

func (*refuser) UnmarshalTOML(any) error { return errors.New("refused") }

// tomlError is what the library says, on one line and without the source.
func tomlError(err error) error {
	if err == nil {
		return nil
	}
	var parse toml.ParseError
	if !errors.As(err, &parse) {
		// A wrong type has its position in the text only.
		m := typeError.FindStringSubmatch(err.Error())
		if m == nil {
			return fmt.Errorf("%w: %s", ErrContents, oneLine(err.Error()))
		}
		line, _ := strconv.Atoi(m[1])
		return &lineError{line, fmt.Errorf("%s: %w: %s", shown(m[2]), ErrContents, oneLine(m[3]))}
	}
	text := parse.Message
	if text == "" {
		// The rest of the library's message is about what was wrong; its
		// head repeats the position.
		text = parse.Error()
		if _, tail, ok := strings.Cut(text, "): "); ok {
			text = tail
		}
		text = strings.TrimPrefix(text, "toml: ")
	}
	if parse.LastKey != "" {
		return &lineError{parse.Position.Line, fmt.Errorf("%s: %w: %s", shown(parse.LastKey), ErrContents, oneLine(text))}
	}
	return &lineError{parse.Position.Line, fmt.Errorf("%w: %s", ErrContents, oneLine(text))}
}

func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "�"))
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "…"
	}
	return s
}

func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == '\u2028' || r == '\u2029' }) < 0
}

// grantLines tells the line of the [[grant]] with an index, or 0 where the
// headers cannot be told apart from text in a string, or are not used.
func grantLines(src []byte, n int) func(i int) int {
	heads := grantLine.FindAllIndex(src, -1)
	return func(i int) int {
		if len(heads) != n {
			return 0
		}
		return 1 + bytes.Count(src[:heads[i][0]], []byte("\n"))
	}
}
