package api

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of a page of events.
const (
	defaultEvents = 1000
	maxEvents     = 10000
	maxTypes      = 32
	maxAnchors    = 64
)

// params reads query parameters strictly: at most one value where one is
// meant, and no empty or over-long one. The first failure sticks.
type params struct {
	q   url.Values
	err error
}

func (p *params) refuse(name, why string) {
	if p.err == nil {
		p.err = Errorf(CodeInvalid, "query parameter %s %s", name, why)
	}
}

func (p *params) text(name string, limit int) string {
	values, given := p.q[name]
	switch {
	case !given:
		return ""
	case len(values) > 1:
		p.refuse(name, "is given more than once")
	case values[0] == "":
		p.refuse(name, "is empty")
	case checkText(name, values[0], limit) != nil:
		p.refuse(name, "is too long or holds a control character")
	}
	return values[0]
}

func (p *params) flag(name string) bool {
	switch s := p.text(name, 8); s {
	case "", "false":
		return false
	case "true":
		return true
	default:
		p.refuse(name, "must be true or false")
		return false
	}
}

func (p *params) number(name string, least, most uint64) uint64 {
	s := p.text(name, 20)
	if s == "" {
		return 0
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n < least || n > most {
		p.refuse(name, "is not a number in its range")
	}
	return n
}

func (p *params) time(name string) *time.Time {
	s := p.text(name, 64)
	if s == "" {
		return nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		p.refuse(name, "is not an RFC 3339 time")
		return nil
	}
	return &t
}

func (p *params) list(name string, most, limit int) []string {
	values := p.q[name]
	if len(values) > most {
		p.refuse(name, "is given too often")
		return nil
	}
	for _, v := range values {
		if checkNeeded(name, v, limit) != nil {
			p.refuse(name, "is empty, too long or holds a control character")
		}
	}
	return values
}

func grantFilter(q url.Values) (GrantFilter, error) {
	p := params{q: q}
	f := GrantFilter{
		VM:        p.text("vm", maxRef),
		Resource:  p.text("resource", maxSpelling),
		Partition: p.text("partition", maxRef),
		All:       p.flag("all"),
	}
	for _, s := range p.list("state", 8, 16) {
		switch st := GrantState(s); st {
		case GrantPending, GrantActive, GrantRevoking, GrantRevoked, GrantFailed:
			f.State = append(f.State, st)
		default:
			p.refuse("state", "names no state of a grant")
		}
	}
	return f, p.err
}

// values is the inverse of grantFilter.
func (f GrantFilter) values() url.Values {
	q := url.Values{}
	set(q, "vm", f.VM)
	set(q, "resource", f.Resource)
	set(q, "partition", f.Partition)
	for _, s := range f.State {
		q.Add("state", string(s))
	}
	if f.All {
		q.Set("all", "true")
	}
	return q
}

func eventQuery(q url.Values) (EventQuery, error) {
	p := params{q: q}
	e := EventQuery{
		After: p.number("after", 0, 1<<63-1),
		VM:    p.text("vm", maxRef),
		Grant: p.text("grant", maxRef),
		Types: p.list("type", maxTypes, 64),
		Since: p.time("since"),
		Until: p.time("until"),
		Limit: int(p.number("limit", 1, maxEvents)), //nolint:gosec // bounded
		Actor: p.text("actor", maxRef),

		Decision: p.text("decision", 16),
	}
	if !slices.Contains(Decisions, e.Decision) && e.Decision != "" {
		p.refuse("decision", "is none of "+strings.Join(Decisions, ", "))
	}
	return e, p.err
}

// values is the inverse of eventQuery.
func (e EventQuery) values() url.Values {
	q := url.Values{}
	if e.After > 0 {
		q.Set("after", strconv.FormatUint(e.After, 10))
	}
	set(q, "vm", e.VM)
	set(q, "grant", e.Grant)
	for _, t := range e.Types {
		q.Add("type", t)
	}
	if e.Since != nil {
		q.Set("since", e.Since.Format(time.RFC3339Nano))
	}
	if e.Until != nil {
		q.Set("until", e.Until.Format(time.RFC3339Nano))
	}
	set(q, "actor", e.Actor)
	set(q, "decision", e.Decision)
	if e.Records {
		q.Set("records", "true")
	}
	if e.Limit > 0 {
		q.Set("limit", strconv.Itoa(e.Limit))
	}
	return q
}

func verifyQuery(q url.Values) (v VerifyQuery, err error) {
	p := params{q: q}
	v.FromAnchor = p.flag("from_anchor")
	for _, s := range p.list("anchor", maxAnchors, 128) {
		seq, hash, _ := strings.Cut(s, ":")
		a := Anchor{Hash: strings.ToLower(hash)}
		a.Seq, err = strconv.ParseUint(seq, 10, 63)
		if digits, bad := hex.DecodeString(hash); err != nil || a.Seq == 0 || bad != nil || len(digits) != sha256.Size {
			p.refuse("anchor", "is not an event's number, a colon and its hash in 64 hexadecimal digits")
		}
		v.Anchors = append(v.Anchors, a)
	}
	if v.FromAnchor && len(v.Anchors) == 0 {
		p.refuse("from_anchor", "needs an anchor to begin at")
	}
	return v, p.err
}

// values is the inverse of verifyQuery.
func (v VerifyQuery) values() url.Values {
	q := url.Values{}
	for _, a := range v.Anchors {
		q.Add("anchor", fmt.Sprintf("%d:%s", a.Seq, a.Hash))
	}
	if v.FromAnchor {
		q.Set("from_anchor", "true")
	}
	return q
}

func set(q url.Values, name, value string) {
	if value != "" {
		q.Set(name, value)
	}
}
