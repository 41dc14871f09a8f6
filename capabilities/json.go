package capabilities

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// encoding/json takes repeated keys, keys in another case, broken UTF-8 and
// lone surrogates, and repairs them in silence. Two readers of one document
// could then see two different capabilities, so the readers here refuse them.

// strictObject reads one JSON object that has exactly the given keys, each
// once.
func strictObject(data []byte, keys ...string) (map[string]json.RawMessage, error) {
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("%w: not UTF-8", ErrEncoding)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("%w: not a JSON object", ErrEncoding)
	}
	fields := make(map[string]json.RawMessage, len(keys))
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrEncoding, err)
		}
		key, ok := t.(string)
		if !ok || !slices.Contains(keys, key) {
			return nil, fmt.Errorf("%w: unknown key %s", ErrEncoding, excerpt(fmt.Sprint(t)))
		}
		if _, ok := fields[key]; ok {
			return nil, fmt.Errorf("%w: key %q given twice", ErrEncoding, key)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrEncoding, err)
		}
		fields[key] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrEncoding, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: bytes after the object", ErrEncoding)
	}
	for _, key := range keys {
		if _, ok := fields[key]; !ok {
			return nil, fmt.Errorf("%w: no key %q", ErrEncoding, key)
		}
	}
	return fields, nil
}

// strictString reads a JSON string, refusing escapes that stand for no
// character.
func strictString(data json.RawMessage) (string, error) {
	var s *string
	if err := json.Unmarshal(data, &s); err != nil || s == nil {
		return "", fmt.Errorf("%w: not a JSON string", ErrEncoding)
	}
	if loneSurrogate(data) {
		return "", fmt.Errorf("%w: a string with half a surrogate pair", ErrEncoding)
	}
	return *s, nil
}

// strictStrings reads a JSON array of strings.
func strictStrings(data json.RawMessage) ([]string, error) {
	var raw []json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil || raw == nil {
		return nil, fmt.Errorf("%w: not a JSON array", ErrEncoding)
	}
	out := make([]string, 0, len(raw))
	for _, r := range raw {
		s, err := strictString(r)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// loneSurrogate looks for \uD800–\uDFFF escapes that are not a pair, in a
// valid JSON string.
func loneSurrogate(data []byte) bool {
	escape := func(i int) (rune, bool) {
		if i+6 > len(data) || data[i] != '\\' || data[i+1] != 'u' {
			return 0, false
		}
		n, err := strconv.ParseUint(string(data[i+2:i+6]), 16, 16)
		return rune(n), err == nil
	}
	for i := 0; i < len(data); i++ {
		if data[i] != '\\' {
			continue
		}
		r, ok := escape(i)
		switch {
		case !ok:
			i++ // an escape of one character, perhaps of a backslash
		case !utf16.IsSurrogate(r):
			i += 5
		default:
			low, ok := escape(i + 6)
			if !ok || utf16.DecodeRune(r, low) == utf8.RuneError {
				return true
			}
			i += 11
		}
	}
	return false
}
