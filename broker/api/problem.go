package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/google/uuid"
)

// ProblemType is the prefix of every problem document's type; the code
// follows it.
const ProblemType = "urn:spectrum-broker:problem:"

const (
	mediaJSON    = "application/json"
	mediaProblem = "application/problem+json"
	mediaNDJSON  = "application/x-ndjson"
)

// kinds is the whole mapping of codes to HTTP.
var kinds = map[Code]struct {
	status int
	title  string
}{
	CodeInvalid:          {http.StatusBadRequest, "The request is malformed"},
	CodeDenied:           {http.StatusForbidden, "Refused"},
	CodePolicyError:      {http.StatusForbidden, "Refused because policy could not decide"},
	CodeTokenRefused:     {http.StatusForbidden, "The token was refused"},
	CodeNotFound:         {http.StatusNotFound, "Not found"},
	CodeMethodNotAllowed: {http.StatusMethodNotAllowed, "The method is not allowed here"},
	CodeAmbiguous:        {http.StatusConflict, "The reference is ambiguous"},
	CodeConflict:         {http.StatusConflict, "Not possible in the present state"},
	CodeNarrower:         {http.StatusConflict, "Policy allows less than was asked"},
	CodeNoSlots:          {http.StatusConflict, "The VM has no device slot left"},
	CodeRevoking:         {http.StatusConflict, "Access is not yet cut"},
	CodeTooLarge:         {http.StatusRequestEntityTooLarge, "The body is too large"},
	CodeUnsupportedMedia: {http.StatusUnsupportedMediaType, "The body is not application/json"},
	CodeKeyReused:        {http.StatusUnprocessableEntity, "The Idempotency-Key was used for another request"},
	CodeRateLimited:      {http.StatusTooManyRequests, "Too many requests"},
	CodeInternal:         {http.StatusInternalServerError, "The broker failed"},
	CodeUnavailable:      {http.StatusServiceUnavailable, "Not available now"},
	CodeTimeout:          {http.StatusGatewayTimeout, "Not done in the time allowed"},
}

// Status returns the HTTP status a code is sent with.
func (c Code) Status() int {
	if k, ok := kinds[c]; ok {
		return k.status
	}
	return http.StatusInternalServerError
}

// asError finds or makes the *Error that stands for err.
func asError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		if _, known := kinds[e.Code]; known {
			return e
		}
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return (&Error{Code: CodeTimeout, Detail: "the request was not finished in the time allowed"}).WithCause(err)
	case errors.Is(err, context.Canceled):
		return (&Error{Code: CodeUnavailable, Detail: "the request was given up, or the broker is stopping"}).WithCause(err)
	}
	return (&Error{Code: CodeInternal}).WithCause(err)
}

// problemOf is the document sent to a person for err. An internal error gets
// an instance, by which its line in the log is found.
func problemOf(err error) Problem {
	e := asError(err)
	p := Problem{
		Type: ProblemType + string(e.Code), Title: kinds[e.Code].title, Status: kinds[e.Code].status,
		Code: e.Code, Detail: e.Detail, Candidates: e.Candidates, Verdict: e.Verdict, Grant: e.Grant, RetryAfter: e.RetryAfter,
	}
	if e.Code == CodeInternal {
		p.Instance = uuid.New().URN()
		p.Detail = "the broker's log has the cause under " + p.Instance
	}
	return p
}

// guestDetails is all that a guest is told of a failure, except for what is
// wrong with the form of its own request.
var guestDetails = map[Code]string{
	CodeDenied:           "policy does not allow this",
	CodeTokenRefused:     "the token is not valid for this VM",
	CodeNotFound:         "there is no such thing",
	CodeConflict:         "not possible in this VM's present state, or the label is in use",
	CodeNarrower:         "policy allows less than was asked",
	CodeNoSlots:          "this VM has no device slot left",
	CodeRevoking:         "access is not yet cut",
	CodeRateLimited:      "slow down",
	CodeInternal:         "the broker failed",
	CodeUnavailable:      "not available now",
	CodeTimeout:          "not done in the time allowed",
	CodeKeyReused:        "the Idempotency-Key came with another request before",
	CodeMethodNotAllowed: "the method is not allowed here",
	CodeUnsupportedMedia: "send application/json",
	CodeTooLarge:         "the body is too large",
}

// guestProblemOf is the document sent to a guest for err. Everything that
// would tell an unknown name from a forbidden one becomes hide, in the same
// words; verdicts, candidates and grants stay inside.
func guestProblemOf(err error, hide Code) Problem {
	e := asError(err)
	code := e.Code
	switch code {
	case CodeDenied, CodePolicyError, CodeNotFound, CodeAmbiguous:
		code = hide
	}
	p := Problem{
		Type: ProblemType + string(code), Title: kinds[code].title, Status: kinds[code].status,
		Code: code, Detail: guestDetails[code],
	}
	switch code {
	case CodeInvalid:
		p.Detail = e.Detail
	case CodeRateLimited, CodeUnavailable:
		p.RetryAfter = e.RetryAfter
	}
	return p
}

// answerProblem renders a problem document.
func answerProblem(p Problem) *answer {
	b, err := json.Marshal(p)
	if err != nil { // a verdict holds only strings and numbers; a grant may hold a bad RawMessage
		p.Verdict, p.Grant = nil, nil
		b, _ = json.Marshal(p)
	}
	return &answer{status: p.Status, contentType: mediaProblem, retryAfter: p.RetryAfter, body: append(b, '\n')}
}

// errorOf reads a problem document back into the error it was made from.
func errorOf(status int, body []byte) *Error {
	var p Problem
	if err := json.Unmarshal(body, &p); err != nil || p.Code == "" {
		return Errorf(CodeInternal, "the broker answered %d %s without a problem document", status, http.StatusText(status))
	}
	e := &Error{Code: p.Code, Detail: p.Detail, Candidates: p.Candidates, Verdict: p.Verdict, Grant: p.Grant, RetryAfter: p.RetryAfter}
	if e.Detail == "" {
		e.Detail = p.Title
	}
	return e
}
