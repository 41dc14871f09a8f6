package api

import "net/http"

// RouteRow is what the tests may see of a row.
type RouteRow struct {
	Method, Path    string
	Rule            Rule
	Query           []string
	Body, NeedsBody bool
	Changes         bool
	Hide            Code
}

func rows(routes []route) []RouteRow {
	var out []RouteRow
	for i := range routes {
		r := &routes[i]
		out = append(out, RouteRow{
			Method: r.method, Path: r.path, Rule: r.rule, Query: r.query,
			Body: r.body != noBody, NeedsBody: r.body == needBody, Changes: r.changes(), Hide: r.hide,
		})
	}
	return out
}

// Rows returns the host's table.
func (h *HostHandler) Rows() []RouteRow { return rows(h.routes) }

// Rows returns the guest's table.
func (h *GuestHandler) Rows() []RouteRow { return rows(h.routes) }

// Admit applies a rule.
func (r Rule) Admit(c Caller, known bool) error { return r.admit(c, known) }

// Rules are all there are.
var Rules = []Rule{RuleNone, RuleAnyone, RulePerson, RulePersonRecorded, RuleHolder}

// Codes are all that have a status.
func Codes() []Code {
	var out []Code
	for c := range kinds {
		out = append(out, c)
	}
	return out
}

// The request decoders.
var (
	DecodeStop    = decode[StopRequest]
	DecodeGrant   = decode[GrantRequest]
	DecodeRevoke  = decode[RevokeRequest]
	DecodeSetName = decode[SetNameRequest]
	DecodeGuest   = decode[GuestRequest]
	DecodeDrop    = decode[DropRequest]

	DecodeDelegation = decode[GuestDelegation]
)

// GuestProblem is what a guest is told.
func GuestProblem(err error, hide Code) Problem { return guestProblemOf(err, hide) }

// HostProblem is what a person is told.
func HostProblem(err error) Problem { return problemOf(err) }

// Bound lowers what a handler bounds.
func (h *HostHandler) Bound(keys int) { h.keys.maxEntries = keys }

var _ http.Handler = (*HostHandler)(nil)
