package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Bounds on what a request may say. The OpenAPI documents repeat them, and a
// test holds the two together.
const (
	maxDepth      = 8
	maxRef        = 512
	maxSpelling   = 8192
	maxReason     = 1024
	maxIDs        = 1024
	maxToken      = 16384
	maxTTLSeconds = 10 * 365 * 24 * 3600
	maxTimeout    = 24 * 3600
)

// labelShape is that of labels and petnames.
var labelShape = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// validator is a request that can say what is wrong with it beyond its types.
type validator interface{ validate() error }

// decode reads exactly one JSON object into out, which must be a pointer to a
// flat struct. Refused: anything but an object, unknown fields, fields that
// differ in case, the same field twice, null, nesting beyond maxDepth, bytes
// that are not UTF-8, trailing data.
func decode[T any, P interface {
	*T
	validator
}](body []byte) (T, error) {
	var out, zero T
	if err := checkShape(body, fieldsOf(reflect.TypeFor[T]())); err != nil {
		return zero, &Error{Code: CodeInvalid, Detail: "the body is refused: " + err.Error()}
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&out); err != nil {
		return zero, &Error{Code: CodeInvalid, Detail: "the body is refused: " + strings.TrimPrefix(err.Error(), "json: ")}
	}
	if err := P(&out).validate(); err != nil {
		return zero, &Error{Code: CodeInvalid, Detail: err.Error()}
	}
	return out, nil
}

// decodeOptional is decode for a body that may be absent.
func decodeOptional[T any, P interface {
	*T
	validator
}](body []byte) (T, error) {
	if len(body) == 0 {
		var zero T
		return zero, nil
	}
	return decode[T, P](body)
}

func fieldsOf(t reflect.Type) map[string]bool {
	names := make(map[string]bool, t.NumField())
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		names[name] = true
	}
	return names
}

// checkShape walks the tokens of body without building anything, so that its
// cost is linear in the body's bounded size and its stack is flat.
func checkShape(body []byte, known map[string]bool) error {
	if !utf8.Valid(body) {
		return fmt.Errorf("it is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	type level struct {
		object bool
		key    bool // the next token is a key
		seen   map[string]bool
	}
	var stack []level
	for first := true; first || len(stack) > 0; first = false {
		tok, err := dec.Token()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return fmt.Errorf("it is not complete JSON")
			}
			return fmt.Errorf("it is not JSON: %w", err)
		}
		if d, ok := tok.(json.Delim); first && (!ok || d != '{') {
			return fmt.Errorf("it is not a JSON object")
		}
		if s, ok := tok.(string); ok && strings.ContainsRune(s, utf8.RuneError) {
			return fmt.Errorf("it holds a string that is not Unicode")
		}
		if n := len(stack); n > 0 && stack[n-1].object && stack[n-1].key {
			if key, ok := tok.(string); ok {
				if n == 1 && !known[key] {
					return fmt.Errorf("unknown field %q", clip(key))
				}
				if stack[n-1].seen[key] {
					return fmt.Errorf("field %q is given twice", clip(key))
				}
				stack[n-1].seen[key] = true
				stack[n-1].key = false
				continue
			}
		}
		switch d := tok.(type) {
		case json.Delim:
			if d == '}' || d == ']' {
				stack = stack[:len(stack)-1]
				break
			}
			if len(stack) == maxDepth {
				return fmt.Errorf("it is nested more than %d deep", maxDepth)
			}
			stack = append(stack, level{object: d == '{', key: d == '{', seen: map[string]bool{}})
			continue
		case nil:
			return fmt.Errorf("null is not a value here; leave the field out")
		}
		if n := len(stack); n > 0 {
			stack[n-1].key = stack[n-1].object
		}
	}
	if rest := bytes.TrimLeft(body[dec.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return fmt.Errorf("there is more than one value")
	}
	return nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// checkText refuses what no spelling, reference or reason needs and what
// would falsify a terminal or a log.
func checkText(field, s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%s is longer than %d bytes", field, limit)
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
		return fmt.Errorf("%s holds a control character", field)
	}
	return nil
}

func checkNeeded(field, s string, limit int) error {
	if s == "" {
		return fmt.Errorf("%s is missing", field)
	}
	return checkText(field, s, limit)
}

func checkLabel(field, s string) error {
	if s != "" && !labelShape.MatchString(s) {
		return fmt.Errorf("%s is not a label: it must match %s", field, labelShape)
	}
	return nil
}

func checkTTL(ttl *int64) error {
	if ttl != nil && (*ttl < 1 || *ttl > maxTTLSeconds) {
		return fmt.Errorf("ttl_seconds must be between 1 and %d", maxTTLSeconds)
	}
	return nil
}

func checkSeconds(field string, s float64) error {
	if s < 0 || s > maxTimeout {
		return fmt.Errorf("%s must be between 0 and %d", field, maxTimeout)
	}
	return nil
}

func (r *StopRequest) validate() error {
	if r.GraceSeconds == nil {
		return nil
	}
	return checkSeconds("grace_seconds", *r.GraceSeconds)
}

func (r *GrantRequest) validate() error {
	return firstError(
		checkNeeded("vm", r.VM, maxRef),
		checkDerived("capability", r.Capability, r.Parent != ""),
		checkTTL(r.TTLSeconds),
		checkLabel("label", r.Label),
		checkText("parent", r.Parent, maxRef),
		checkCount("max_uses", r.MaxUses, 1),
		checkCount("max_depth", r.MaxDepth, 0),
		checkSeconds("timeout_seconds", r.TimeoutSeconds),
	)
}

func (r *RevokeRequest) validate() error {
	if r.IDs != nil && len(r.IDs) == 0 {
		return fmt.Errorf("ids is empty")
	}
	given := 0
	for _, is := range []bool{len(r.IDs) > 0, r.VM != "", r.Resource != "", r.All} {
		if is {
			given++
		}
	}
	if given != 1 {
		return fmt.Errorf("give exactly one of ids, vm, resource and all")
	}
	if len(r.IDs) > maxIDs {
		return fmt.Errorf("ids names more than %d grants", maxIDs)
	}
	for _, id := range r.IDs {
		if err := checkNeeded("ids", id, maxRef); err != nil {
			return err
		}
	}
	return firstError(
		checkText("vm", r.VM, maxRef),
		checkLength("resource", r.Resource, maxSpelling),
		checkText("reason", r.Reason, maxReason),
		checkSeconds("timeout_seconds", r.TimeoutSeconds),
	)
}

// UnmarshalJSON takes a UUID in its one canonical spelling, of the several
// that uuid.Parse knows.
func (r *SetNameRequest) UnmarshalJSON(b []byte) error {
	var wire struct {
		Partition string `json:"partition"`
	}
	if err := json.Unmarshal(b, &wire); err != nil {
		return err
	}
	id, err := uuid.Parse(wire.Partition)
	if err != nil || id.String() != wire.Partition {
		return fmt.Errorf("partition is not a UUID in lower case with dashes")
	}
	r.Partition = id
	return nil
}

func (r *SetNameRequest) validate() error {
	if r.Partition == uuid.Nil {
		return fmt.Errorf("partition is missing")
	}
	return nil
}

func (r *GuestRequest) validate() error {
	return firstError(
		checkSpelling("capability", r.Capability),
		checkTTL(r.TTLSeconds),
		checkLabel("label", r.Label),
		checkToken("parent", r.Parent),
	)
}

func (r *DropRequest) validate() error {
	if r.Token == "" {
		return fmt.Errorf("token is missing")
	}
	return checkToken("token", r.Token)
}

// checkSpelling bounds a spelling and nothing else: a path may hold control
// characters, and its kind says what is wrong with one.
func checkSpelling(field, s string) error {
	if s == "" {
		return fmt.Errorf("%s is missing", field)
	}
	return checkLength(field, s, maxSpelling)
}

func checkLength(field, s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%s is longer than %d bytes", field, limit)
	}
	return nil
}

// checkToken looks at the alphabet only, and says nothing of the content.
func checkToken(field, s string) error {
	if len(s) > maxToken {
		return fmt.Errorf("%s is longer than %d bytes", field, maxToken)
	}
	if strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_'
	}) {
		return fmt.Errorf("%s is not base64url without padding", field)
	}
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
