package policy

// Outcome is what an engine, or all of them together, said.
type Outcome string

const (
	Allow Outcome = "allow"
	Deny  Outcome = "deny"
	Ask   Outcome = "ask"
	// Error is a denial because the engine could not say: error, timeout,
	// wrong shape, no policy in force.
	Error Outcome = "error"
	// Abstain is the host's engine having no rule for a request in which
	// nothing belongs to the host.
	Abstain Outcome = "abstain"
)

// Kinds of reasons.
const (
	ReasonAllow     = "allow"     // an allow rule that holds
	ReasonDeny      = "deny"      // a message of a deny rule
	ReasonAsk       = "ask"       // a question of an ask rule
	ReasonUndefined = "undefined" // an allow rule that does not hold, or none exists
	ReasonError     = "error"     // why the engine could not say
)

// Reason is one cause of an answer and where the policy says so.
type Reason struct {
	Text string `json:"text"`
	Rule string `json:"rule,omitempty"` // "deny"; empty: no rule is to blame
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	Kind string `json:"kind"`
}

// Answer is what one engine said.
type Answer struct {
	Engine    EngineID `json:"engine"`
	Name      string   `json:"name"`
	Concerned bool     `json:"concerned"` // whether its allow was needed
	Outcome   Outcome  `json:"outcome"`
	Reasons   []Reason `json:"reasons"`
	Limits    Limits   `json:"limits"`
	Revision  string   `json:"revision"`
}

// Limits narrow a grant. A nil field limits nothing.
type Limits struct {
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	MaxUses    *int64 `json:"max_uses,omitempty"`
	MaxDepth   *int64 `json:"max_depth,omitempty"`
	MaxLive    *int64 `json:"max_live,omitempty"`
	MaxTotal   *int64 `json:"max_total,omitempty"`
	ReadOnly   bool   `json:"read_only,omitempty"`
}

// Verdict is the combination of all engines' answers.
type Verdict struct {
	Outcome Outcome  `json:"outcome"`
	Answers []Answer `json:"answers"` // host first
	Limits  Limits   `json:"limits"`
}
