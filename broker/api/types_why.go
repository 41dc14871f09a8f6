package api

// WhyStep is one step of how a grant came to be: what was granted, who asked for
// it, and the decision that allowed it.
type WhyStep struct {
	Grant     Grant  `json:"grant"`  // with the decision
	Action    string `json:"action"` // grant | delegate | request
	Actor     Actor  `json:"actor"`
	ActorName string `json:"actor_name,omitempty"` // of a VM
	Seq       uint64 `json:"seq"`                  // of its event in the audit
	Live      bool   `json:"live"`                 // in force, with all that it derives from
	Dead      string `json:"dead,omitempty"`       // why it is not
}

// Why is the answer to GET /v1/grants/{ref}/why: from the grant up to the one
// that derives from nothing.
type Why struct {
	Steps []WhyStep `json:"steps"`
}
