package api

import (
	"context"
	"net/http"
)

func (h *HostHandler) renew(x *exchange) (reply, error) {
	req, err := decodeOptional[RenewRequest](x.body)
	if err != nil {
		return reply{}, err
	}
	return okUnless(h.svc.Renew(x.r.Context(), x.caller, x.params["ref"], req))
}

func (r *RenewRequest) validate() error {
	return firstError(checkTTL(r.TTLSeconds), checkSeconds("timeout_seconds", r.TimeoutSeconds))
}

// Renew gives a live grant a later deadline.
func (c *Client) Renew(ctx context.Context, ref string, r RenewRequest) (Grant, error) {
	return call[Grant](ctx, c, http.MethodPost, "/v1/grants/"+seg(ref)+"/renew", nil, r)
}
