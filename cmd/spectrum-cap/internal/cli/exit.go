package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

// The exit codes. They are part of the interface: they are added to, never
// changed.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitDenied      = 3
	exitNotFound    = 4
	exitAmbiguous   = 5
	exitRevoking    = 6
	exitUnreachable = 7
	exitNarrower    = 8
	exitTimeout     = 9
	exitInterrupted = 130
)

// ExitCode is one of the exit codes with what it says.
type ExitCode struct {
	Code int
	Text string
}

// ExitCodes are all of them, in order.
func ExitCodes() []ExitCode {
	return []ExitCode{
		{exitOK, "done"},
		{exitFailed, "failed"},
		{exitUsage, "the command or the request makes no sense"},
		{exitDenied, "denied: policy or the broker refuses it"},
		{exitNotFound, "there is no such VM, grant, partition or name"},
		{exitAmbiguous, "the name fits several"},
		{exitRevoking, "revoking: the revocation is on record, access is not yet cut"},
		{exitUnreachable, "the broker does not answer, or cannot serve now"},
		{exitNarrower, "policy allows less than was asked, and --accept-narrower is missing"},
		{exitTimeout, "not done in the time allowed"},
		{exitInterrupted, "interrupted"},
	}
}

func exitCodeText() string {
	var b strings.Builder
	for _, c := range ExitCodes() {
		fmt.Fprintf(&b, "  %3d  %s\n", c.Code, c.Text)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// usageError is the caller's mistake in how the command is written.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// codedError is a failure with an exit code that the broker's answer, which
// has been printed, calls for.
type codedError struct {
	code int
	text string
}

func (e *codedError) Error() string { return e.text }

func exitCode(err error) int {
	var (
		coded *codedError
		bad   *usageError
		said  *api.Error
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &bad):
		return exitUsage
	case errors.As(err, &said):
		return codeOf(said.Code)
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	case errors.Is(err, api.ErrUnreachable):
		return exitUnreachable
	}
	return exitFailed
}

func codeOf(code api.Code) int {
	switch code {
	case api.CodeInvalid:
		return exitUsage
	case api.CodeDenied, api.CodePolicyError, api.CodeTokenRefused:
		return exitDenied
	case api.CodeNotFound:
		return exitNotFound
	case api.CodeAmbiguous:
		return exitAmbiguous
	case api.CodeRevoking:
		return exitRevoking
	case api.CodeUnavailable:
		return exitUnreachable
	case api.CodeNarrower:
		return exitNarrower
	case api.CodeTimeout:
		return exitTimeout
	}
	return exitFailed
}

// printError tells what could not be done, and what the broker added.
func (a *app) printError(cmd *cobra.Command, err error) {
	if errors.Is(err, errHelpShown) {
		return
	}
	var (
		bad  *usageError
		said *api.Error
	)
	text := err.Error()
	switch {
	case errors.Is(err, context.Canceled):
		text = "interrupted; what was asked of the broker may still happen"
	case errors.Is(err, context.DeadlineExceeded):
		text = "the broker did not answer in time; what was asked of it may still happen"
	}
	if errors.As(err, &said) && said.Detail == "" {
		text = strings.ReplaceAll(string(said.Code), "_", " ")
	}
	a.note("%s%s", a.headline(err), text)
	if said != nil {
		for _, line := range details(said) {
			_, _ = fmt.Fprintln(a.host.Stderr, "  "+plain(line))
		}
	}
	if errors.As(err, &bad) && cmd != nil {
		_, _ = fmt.Fprintf(a.host.Stderr, "See '%s --help'.\n", cmd.CommandPath())
	}
}

// headline says of what kind the failure is, where its text may not.
func (a *app) headline(err error) string {
	var said *api.Error
	if !errors.As(err, &said) {
		return ""
	}
	word := map[api.Code]string{
		api.CodeDenied: "denied", api.CodePolicyError: "denied", api.CodeTokenRefused: "denied",
		api.CodeNarrower: "narrower than asked", api.CodeTimeout: "timed out", api.CodeRevoking: "revoking",
	}[said.Code]
	if word == "" || strings.HasPrefix(said.Detail, word) {
		return ""
	}
	return word + ": "
}

// details are what an error of the broker carries beyond its text.
func details(e *api.Error) []string {
	var lines []string
	if len(e.Candidates) > 0 {
		lines = append(lines, "it could be any of:")
		for _, c := range e.Candidates {
			lines = append(lines, "  "+c)
		}
	}
	if e.Verdict != nil {
		lines = append(lines, verdictLines(*e.Verdict)...)
	}
	if e.Code == api.CodeNarrower {
		lines = append(lines, "to take it nevertheless: --accept-narrower")
	}
	if e.Grant != nil {
		lines = append(lines, fmt.Sprintf("grant %s is %s", e.Grant.ID, e.Grant.State))
	}
	if e.RetryAfter > 0 {
		lines = append(lines, fmt.Sprintf("try again in %d s", e.RetryAfter))
	}
	return lines
}

// verdictLines tell what each engine said and why.
func verdictLines(v api.Verdict) []string {
	var lines []string
	for _, answer := range v.Answers {
		lines = append(lines, fmt.Sprintf("policy of %s: %s", engineName(answer), answer.Outcome))
		for _, r := range answer.Reasons {
			lines = append(lines, "  "+reasonText(r))
		}
		if l := limitsText(answer.Limits); l != "" {
			lines = append(lines, "  limits: "+l)
		}
	}
	return lines
}

// hostEngine is the host's policy engine; the others are partitions.
const hostEngine = "host"

func engineName(a api.Answer) string {
	switch {
	case a.Engine == hostEngine:
		return "the host"
	case a.Name != "":
		return "partition " + a.Name
	}
	return "partition " + a.Engine
}

func reasonText(r api.Reason) string {
	where := r.Rule
	if r.File != "" {
		if where != "" {
			where += ", "
		}
		where += r.File
		if r.Line > 0 {
			where += fmt.Sprintf(":%d", r.Line)
		}
	}
	text := r.Text
	if r.Kind != "" && r.Kind != text {
		text = r.Kind + ": " + text
	}
	if where != "" {
		text += " (" + where + ")"
	}
	return text
}

func limitsText(l api.Limits) string {
	var parts []string
	if l.ReadOnly {
		parts = append(parts, "read-only")
	}
	for _, n := range []struct {
		name  string
		value *int64
	}{
		{"ttl_seconds", l.TTLSeconds},
		{"max_uses", l.MaxUses},
		{"max_depth", l.MaxDepth},
		{"max_live", l.MaxLive},
		{"max_total", l.MaxTotal},
	} {
		if n.value != nil {
			parts = append(parts, fmt.Sprintf("%s %d", n.name, *n.value))
		}
	}
	return strings.Join(parts, ", ")
}
