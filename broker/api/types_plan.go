package api

import (
	"time"

	"github.com/google/uuid"
)

// Trouble is what cannot be made, or taken away, just now, and is tried again.
type Trouble struct {
	Verb     string    `json:"verb"` // apply | extend | withdraw | release
	Since    time.Time `json:"since"`
	Attempts int       `json:"attempts"`
	// Next is when it is tried again; absent: it is being tried.
	Next  *time.Time `json:"next,omitempty"`
	Error string     `json:"error"`
}

// Plan is the answer to GET /v1/plan: what the broker would do now, and why.
type Plan struct {
	At  time.Time `json:"at"`
	VMs []VMPlan  `json:"vms"` // those in which something is to be done, or waits
}

// VMPlan is the plan for one VM.
type VMPlan struct {
	VM   uuid.UUID `json:"vm"`
	Name string    `json:"name"`
	// Steps are what is to be done, what takes something away first.
	Steps []PlanStep `json:"steps"`
	// Waits are what something else must be there for first.
	Waits []PlanStep `json:"waits"`
	// Blind is why the VM cannot be looked at. What is known to be done all the
	// same is in steps.
	Blind []string `json:"blind,omitempty"`
}

// PlanStep is one step of a plan.
type PlanStep struct {
	Verb       string      `json:"verb"` // withdraw | release | extend | apply | wait
	Kind       string      `json:"kind"`
	Object     string      `json:"object"`
	Generation uint64      `json:"generation"`
	Grants     []uuid.UUID `json:"grants"` // that it is done for
	Spoken     string      `json:"spoken,omitempty"`
	Label      string      `json:"label,omitempty"`
	Why        string      `json:"why"`
	UnderWay   bool        `json:"under_way"`
	Trouble    *Trouble    `json:"trouble,omitempty"`
}
