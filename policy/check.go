package policy

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Severities of findings.
const (
	SeverityError   = "error"   // the policy does not load
	SeverityWarning = "warning" // it loads, and is slow or does less than it seems to
)

// Finding is one thing that is wrong with a policy.
type Finding struct {
	File     string `json:"file"`
	Line     int    `json:"line"`
	Col      int    `json:"col"`
	Message  string `json:"message"`
	Severity string `json:"severity"`
}

// String is "file:line:col: message"; a warning says that it is one.
func (f Finding) String() string {
	message := oneLine(f.Message)
	if f.Severity == SeverityWarning {
		message = "warning: " + message
	}
	if f.Line == 0 {
		return f.File + ": " + message
	}
	return fmt.Sprintf("%s:%d:%d: %s", f.File, f.Line, f.Col, message)
}

// maxFindings bounds a report: what is wrong a hundred times is wrong once.
const maxFindings = 100

func sortFindings(findings []Finding) []Finding {
	slices.SortStableFunc(findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col),
			cmp.Compare(a.Severity, b.Severity), cmp.Compare(a.Message, b.Message))
	})
	// The parser may say of one place the same again, at more length.
	for i := len(findings) - 2; i >= 0; i-- {
		short, long := findings[i], findings[i+1]
		longMessage := long.Message
		long.Message = short.Message
		if long == short && strings.HasPrefix(longMessage, short.Message) {
			findings = slices.Delete(findings, i, i+1)
		}
	}
	if len(findings) > maxFindings {
		findings = findings[:maxFindings]
	}
	return findings
}

func hasErrors(findings []Finding) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Severity == SeverityError })
}

// LoadError is a revision that does not load, with all that is wrong with it.
type LoadError struct {
	Findings []Finding
}

func (e *LoadError) Error() string {
	for i, f := range e.Findings {
		if f.Severity == SeverityError {
			if n := len(e.Findings) - i - 1; n > 0 {
				return fmt.Sprintf("%s (and %d more)", f, n)
			}
			return f.String()
		}
	}
	return "the policy does not load"
}

// display is how a source file is named to people.
func (s Sources) display(name string) string { return path.Join(s.Dir, name) }
