package api

import (
	"errors"
	"fmt"
)

// Code names what went wrong, for programs. Codes are part of the API: they
// are added to, never changed.
type Code string

// The codes, with their HTTP status.
const (
	CodeInvalid      Code = "invalid"       // 400: the request is malformed or makes no sense
	CodeDenied       Code = "denied"        // 403: policy refused, or the caller may not
	CodePolicyError  Code = "policy_error"  // 403: policy could not decide, which is a refusal
	CodeTokenRefused Code = "token_refused" // 403: the token is not valid, or not the caller's
	CodeNotFound     Code = "not_found"     // 404: no such thing, or none the caller may know of
	CodeAmbiguous    Code = "ambiguous"     // 409: the reference fits several; see candidates
	CodeConflict     Code = "conflict"      // 409: the thing is not in a state for this
	CodeNarrower     Code = "narrower"      // 409: policy allows less than was asked
	CodeNoSlots      Code = "no_slots"      // 409: the VM has no device slot left
	CodeKeyReused    Code = "key_reused"    // 422: the Idempotency-Key came with another request
	CodeRevoking     Code = "revoking"      // 409: access is not yet cut
	CodeTooLarge     Code = "too_large"     // 413: the body is over the bound
	CodeRateLimited  Code = "rate_limited"  // 429: too many requests
	CodeInternal     Code = "internal"      // 500: the broker failed; its log says how
	CodeUnavailable  Code = "unavailable"   // 503: not ready, or something it needs is not
	CodeTimeout      Code = "timeout"       // 504: not done in the time allowed

	CodeMethodNotAllowed Code = "method_not_allowed" // 405: the path exists, not with this method
	CodeUnsupportedMedia Code = "unsupported_media"  // 415: the body is not application/json
)

// ErrUnreachable is what every call of Client fails with when no broker
// answers on the socket.
var ErrUnreachable = errors.New("broker unreachable")

// Error is a failure that a caller may act on. Everything in it but the cause
// is sent; the cause only goes to the log.
type Error struct {
	Code       Code
	Detail     string
	Candidates []string // with CodeAmbiguous
	Verdict    *Verdict // with CodeDenied, CodePolicyError and CodeNarrower
	Grant      *Grant   // the grant concerned, where there is one
	RetryAfter int      // seconds, with CodeRateLimited and CodeUnavailable
	cause      error
}

// Errorf makes an Error whose detail is the formatted text. An operand of %w
// becomes the cause, so that its text is sent as part of the detail; use
// WithCause for one that must not be.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Detail: err.Error(), cause: errors.Unwrap(err)}
}

// WithCause returns a copy of e that carries cause, which is logged and found
// by errors.Is, never sent.
func (e *Error) WithCause(cause error) *Error {
	c := *e
	c.cause = cause
	return &c
}

// Error implements error. It says what is sent, not the cause.
func (e *Error) Error() string {
	if e.Detail == "" {
		return string(e.Code)
	}
	return e.Detail
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// Is matches another *Error by its code alone, so that
// errors.Is(err, &api.Error{Code: api.CodeDenied}) asks for a code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && t.Detail == ""
}

// CodeOf returns the code of the *Error in err's chain, or CodeInternal.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return CodeInternal
}
