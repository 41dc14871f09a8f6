package policy

import (
	"fmt"
	"strings"
)

// Intersect is the tighter of two limits, field by field: minimum, or.
func (l Limits) Intersect(m Limits) Limits {
	return Limits{
		TTLSeconds: tighter(l.TTLSeconds, m.TTLSeconds),
		MaxUses:    tighter(l.MaxUses, m.MaxUses),
		MaxDepth:   tighter(l.MaxDepth, m.MaxDepth),
		MaxLive:    tighter(l.MaxLive, m.MaxLive),
		MaxTotal:   tighter(l.MaxTotal, m.MaxTotal),
		ReadOnly:   l.ReadOnly || m.ReadOnly,
	}
}

func tighter(a, b *int64) *int64 {
	switch {
	case a == nil:
		return b
	case b == nil || *a <= *b:
		return a
	default:
		return b
	}
}

// Combine is the whole of how engines' answers become one: any deny or error
// denies; every engine concerned must allow; any ask asks; the limits of all
// that allowed or asked are intersected. It is pure, and no answers at all
// deny.
func Combine(answers []Answer) Verdict {
	v := Verdict{Outcome: Allow, Answers: answers}
	if len(answers) == 0 {
		v.Outcome = Deny
		return v
	}
	ask := false
	for _, a := range answers {
		switch a.Outcome {
		case Allow:
		case Ask:
			ask = true
		case Abstain:
			if a.Concerned {
				v.Outcome = Deny
			}
		default:
			v.Outcome = Deny
		}
		v.Limits = v.Limits.Intersect(a.Limits)
	}
	if v.Outcome == Deny {
		v.Limits = Limits{}
	} else if ask {
		v.Outcome = Ask
	}
	return v
}

// Decisive is the answer and the reason that settled the verdict: of the
// engines that decided it the first, of its reasons the first.
func (v Verdict) Decisive() (Answer, Reason, bool) {
	for _, a := range v.Answers {
		if a.settles(v.Outcome) {
			if len(a.Reasons) > 0 {
				return a, a.Reasons[0], true
			}
			return a, Reason{}, true
		}
	}
	return Answer{}, Reason{}, false
}

func (a Answer) settles(o Outcome) bool {
	switch o {
	case Deny:
		return a.Outcome == Deny || a.Outcome == Error || (a.Concerned && a.Outcome == Abstain)
	default:
		return a.Outcome == o
	}
}

// Summary is the verdict in one line: the engine, its reason, and the rule's
// file and line.
func (v Verdict) Summary() string {
	a, r, ok := v.Decisive()
	if !ok {
		if v.Outcome == Allow {
			return "allowed"
		}
		return "denied: no policy engine was asked"
	}
	var b strings.Builder
	switch v.Outcome {
	case Allow:
		b.WriteString("allowed by the policy of ")
	case Ask:
		b.WriteString("nobody was asked what the policy of ")
	default:
		b.WriteString("denied by the policy of ")
	}
	b.WriteString(a.Name)
	if v.Outcome == Ask {
		b.WriteString(" wants answered")
	}
	if r.Text != "" {
		b.WriteString(": " + oneLine(r.Text))
	}
	if at := r.At(); at != "" {
		b.WriteString(" (" + at + ")")
	}
	return b.String()
}

// At is "deny, host.rego:12", as much of it as is known.
func (r Reason) At() string {
	var parts []string
	if r.Rule != "" {
		parts = append(parts, r.Rule)
	}
	if r.File != "" {
		parts = append(parts, fmt.Sprintf("%s:%d", r.File, r.Line))
	}
	return strings.Join(parts, ", ")
}

// oneLine keeps a policy's text from forging further lines of a terminal or a
// log, and bounds it.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, s)
	if runes := []rune(s); len(runes) > 300 {
		s = string(runes[:299]) + "…"
	}
	return s
}
