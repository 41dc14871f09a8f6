package policy

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

var limitNames = []string{"ttl_seconds", "read_only", "max_uses", "max_depth", "max_live", "max_total"}

func errUnknownLimit(name string) error {
	return fmt.Errorf("unknown limit %s: there are %s", name, strings.Join(limitNames, ", "))
}

// set narrows l by one named limit of one object.
func (l *Limits) set(name string, v ast.Value) error {
	if name == "read_only" {
		b, ok := v.(ast.Boolean)
		if !ok {
			return fmt.Errorf("limit read_only must be a boolean, not %s", ast.ValueName(v))
		}
		l.ReadOnly = l.ReadOnly || bool(b)
		return nil
	}
	field := l.field(name)
	if field == nil {
		return errUnknownLimit(name)
	}
	number, ok := v.(ast.Number)
	if !ok {
		return fmt.Errorf("limit %s must be a number, not %s", name, ast.ValueName(v))
	}
	n, err := wholeNumber(number)
	if err != nil {
		return fmt.Errorf("limit %s is %s: %w", name, number, err)
	}
	*field = tighter(*field, &n)
	return nil
}

func (l *Limits) field(name string) **int64 {
	switch name {
	case "ttl_seconds":
		return &l.TTLSeconds
	case "max_uses":
		return &l.MaxUses
	case "max_depth":
		return &l.MaxDepth
	case "max_live":
		return &l.MaxLive
	case "max_total":
		return &l.MaxTotal
	}
	return nil
}

// wholeNumber reads also 1e3 and 2.0. It goes through float64 where that is
// exact, never through an exact rational, whose size an exponent would choose.
func wholeNumber(number ast.Number) (int64, error) {
	if n, err := strconv.ParseInt(string(number), 10, 64); err == nil {
		if n < 0 {
			return 0, errors.New("it must not be negative")
		}
		return n, nil
	}
	f, err := strconv.ParseFloat(string(number), 64)
	switch {
	case err != nil || f > 1<<53:
		return 0, errors.New("it is too large")
	case f < 0:
		return 0, errors.New("it must not be negative")
	case f != math.Trunc(f):
		return 0, errors.New("it must be a whole number")
	}
	return int64(f), nil
}
