package capabilities

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Bounds of a partition-relative path, in bytes: what Linux itself takes
// (PATH_MAX holds the path without its leading "/", and the final NUL).
const (
	MaxPath      = 4096
	MaxComponent = 255
)

// Errors of ParseRelPath, one for each way a path can be wrong.
var (
	ErrPathNotAbsolute      = errors.New(`does not begin with "/"`)
	ErrPathTooLong          = fmt.Errorf("is longer than %d bytes", MaxPath)
	ErrPathComponentTooLong = fmt.Errorf("has a component longer than %d bytes", MaxComponent)
	ErrPathNUL              = errors.New("contains a NUL byte")
	ErrPathNotUTF8          = errors.New("is not UTF-8")
	ErrPathEmptyComponent   = errors.New(`has an empty component ("//", or "/" at its end)`)
	ErrPathDot              = errors.New(`has "." as a component`)
	ErrPathDotDot           = errors.New(`has ".." as a component`)
)

// RelPath names something beneath a partition's files/ directory. It has been
// checked for form only: what it leads to is known when it is opened. Each
// place has one spelling, so that == means the same place. The zero value is
// no path, and nothing covers it or is covered by it.
type RelPath struct {
	s string // "/" or "/a/b"
}

// ParseRelPath reads a path as it is spelt, "/a/b". It changes nothing: what
// is not in the one form is refused with one of the errors above.
func ParseRelPath(s string) (RelPath, error) {
	if err := checkPath(s); err != nil {
		return RelPath{}, fmt.Errorf("path %s %w", excerpt(s), err)
	}
	return RelPath{s}, nil
}

func checkPath(s string) error {
	switch {
	case len(s) > MaxPath:
		return ErrPathTooLong
	case strings.IndexByte(s, 0) >= 0:
		return ErrPathNUL
	case !utf8.ValidString(s):
		return ErrPathNotUTF8
	case s == "" || s[0] != '/':
		return ErrPathNotAbsolute
	case s == "/":
		return nil
	}
	for c := range strings.SplitSeq(s[1:], "/") {
		switch {
		case c == "":
			return ErrPathEmptyComponent
		case c == ".":
			return ErrPathDot
		case c == "..":
			return ErrPathDotDot
		case len(c) > MaxComponent:
			return ErrPathComponentTooLong
		}
	}
	return nil
}

// String is the path as it is spelt, "/a/b"; "/" is all of files/.
func (p RelPath) String() string { return p.s }

// IsZero tells whether p is no path.
func (p RelPath) IsZero() bool { return p.s == "" }

// Rel is the path as openat2 takes it relative to files/: "a/b", or "." for
// all of files/. It is empty for the zero value, which openat2 refuses.
func (p RelPath) Rel() string {
	if p.s == "/" {
		return "."
	}
	return strings.TrimPrefix(p.s, "/")
}

// Contains tells whether q is p or beneath it, component by component: "/a"
// contains "/a/b" and not "/ab".
func (p RelPath) Contains(q RelPath) bool {
	if p.s == "" || q.s == "" {
		return false
	}
	if p.s == "/" || p.s == q.s {
		return true
	}
	return len(q.s) > len(p.s) && q.s[len(p.s)] == '/' && q.s[:len(p.s)] == p.s
}

// MarshalText writes the path as it is spelt.
func (p RelPath) MarshalText() ([]byte, error) {
	if p.IsZero() {
		return nil, fmt.Errorf("%w: no path", ErrResource)
	}
	return []byte(p.s), nil
}

// UnmarshalText is ParseRelPath.
func (p *RelPath) UnmarshalText(text []byte) error {
	q, err := ParseRelPath(string(text))
	if err != nil {
		return err
	}
	*p = q
	return nil
}
