package api

import (
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Rule says who may use a route. It is checked before the route's handler
// runs and whatever that does.
type Rule int

// The access rules. The zero Rule admits nobody.
const (
	RuleNone Rule = iota
	// RuleAnyone admits whoever could open the socket; the answer holds
	// nothing of any VM or partition.
	RuleAnyone
	// RulePerson admits a process of the host whose peer credentials the
	// kernel gave; the socket's mode and group say whose.
	RulePerson
	// RulePersonRecorded is RulePerson for what changes something: the
	// caller's uid and pid go into the policy input and the audit.
	RulePersonRecorded
	// RuleHolder admits a VM, known by its listener, to what it holds itself.
	RuleHolder
)

// String names the rule as the reference pages do.
func (r Rule) String() string {
	switch r {
	case RuleAnyone:
		return "anyone"
	case RulePerson:
		return "person"
	case RulePersonRecorded:
		return "person-recorded"
	case RuleHolder:
		return "holder"
	}
	return "none"
}

// admit applies a rule to a caller; known says that the kernel told who it is.
func (r Rule) admit(c Caller, known bool) error {
	ok := false
	switch r {
	case RuleAnyone:
		ok = true
	case RulePerson, RulePersonRecorded:
		ok = known && c.Kind == CallerPerson
	case RuleHolder:
		ok = known && c.Kind == CallerVM
	}
	if !ok {
		return &Error{Code: CodeDenied, Detail: "the caller may not use this route"}
	}
	return nil
}

// route is one row of a table.
type route struct {
	method string
	path   string // segments in braces match any one segment
	rule   Rule
	query  []string // the parameters it takes
	body   bodyRule
	hide   Code // guest routes: what stands for whatever the guest may not know
	handle func(*exchange) (reply, error)
}

type bodyRule int

const (
	noBody bodyRule = iota
	optionalBody
	needBody
)

// changes says whether the route may change something.
func (r *route) changes() bool { return r.method != http.MethodGet }

// exchange is one request, read and admitted.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	caller Caller
	params map[string]string
	query  url.Values
	body   []byte
}

// reply is what a handler answers with: a JSON body, or one of the others.
type reply struct {
	status   int
	body     any
	location string
	stream   func(w http.ResponseWriter) error // writes everything itself
	upgrade  net.Conn                          // joined to the client's connection
}

func ok(body any) (reply, error) { return reply{status: http.StatusOK, body: body}, nil }

// find returns the row for a request and the values of its wildcards. Where
// only the method differs, allow lists the methods there are.
func find(routes []route, method, escapedPath string) (rt *route, params map[string]string, allow []string) {
	got := strings.Split(escapedPath, "/")
	for i := range routes {
		values, match := matchPath(routes[i].path, got)
		if !match {
			continue
		}
		if routes[i].method == method {
			return &routes[i], values, nil
		}
		allow = append(allow, routes[i].method)
	}
	slices.Sort(allow)
	return nil, nil, allow
}

// matchPath compares segment by segment before unescaping, so that an escaped
// slash belongs to its segment. An empty wildcard does not match.
func matchPath(pattern string, got []string) (map[string]string, bool) {
	want := strings.Split(pattern, "/")
	if len(want) != len(got) {
		return nil, false
	}
	var values map[string]string
	for i, w := range want {
		seg, err := url.PathUnescape(got[i])
		if err != nil {
			return nil, false
		}
		if name, isWild := strings.CutPrefix(w, "{"); isWild {
			if seg == "" {
				return nil, false
			}
			if values == nil {
				values = map[string]string{}
			}
			values[strings.TrimSuffix(name, "}")] = seg
		} else if seg != w {
			return nil, false
		}
	}
	return values, true
}
