package api

import (
	"context"
	"net/http"
	"net/url"
)

func (h *HostHandler) plan(x *exchange) (reply, error) {
	p := params{q: x.query}
	vm := p.text("vm", maxRef)
	if p.err != nil {
		return reply{}, p.err
	}
	plan, err := h.svc.Plan(x.r.Context(), vm)
	plan.VMs = present(plan.VMs)
	for i := range plan.VMs {
		v := &plan.VMs[i]
		v.Steps, v.Waits = present(v.Steps), present(v.Waits)
		for _, steps := range [][]PlanStep{v.Steps, v.Waits} {
			for j := range steps {
				steps[j].Grants = present(steps[j].Grants)
			}
		}
	}
	return okUnless(plan, err)
}

// Plan is what the broker would do now: everywhere, or in the VM that is named.
func (c *Client) Plan(ctx context.Context, vm string) (Plan, error) {
	q := url.Values{}
	set(q, "vm", vm)
	return call[Plan](ctx, c, http.MethodGet, "/v1/plan", q, nil)
}
