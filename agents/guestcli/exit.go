package guestcli

import (
	"context"
	"errors"
)

// Exit codes, the same as spectrum-cap's.
const (
	ExitOK          = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitDenied      = 3
	ExitNotFound    = 4
	ExitAmbiguous   = 5
	ExitRevoking    = 6
	ExitUnreachable = 7
	ExitNarrower    = 8
	ExitTimeout     = 9
)

// exitHelp is part of every command's help.
const exitHelp = `Exit codes: 0 done, 1 failed, 2 usage, 3 denied, 4 not found, 5 ambiguous,
6 given up but not yet cut, 7 broker unreachable, 8 narrower than asked,
9 timed out.`

// errUsage marks what the caller wrote wrongly.
var errUsage = errors.New("usage")

// byCode maps the broker's problem codes; the rest is [ExitFailed].
var byCode = map[string]int{
	"invalid":       ExitUsage,
	"denied":        ExitDenied,
	"policy_error":  ExitDenied,
	"token_refused": ExitDenied,
	"not_found":     ExitNotFound,
	"ambiguous":     ExitAmbiguous,
	"revoking":      ExitRevoking,
	"unavailable":   ExitUnreachable,
	"narrower":      ExitNarrower,
	"timeout":       ExitTimeout,
}

// ExitCode is what the program ends with after err.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	if p, ok := errors.AsType[*Problem](err); ok {
		if code, known := byCode[p.Code]; known {
			return code
		}
		return ExitFailed
	}
	switch {
	case errors.Is(err, errUsage):
		return ExitUsage
	case errors.Is(err, errStillCutting):
		return ExitRevoking
	case errors.Is(err, context.DeadlineExceeded):
		return ExitTimeout
	case errors.Is(err, ErrUnreachable):
		return ExitUnreachable
	}
	return ExitFailed
}
