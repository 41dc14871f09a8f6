package api

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"time"
)

// events streams NDJSON: what there is after the cursor, at most limit, or
// with follow what there is and what comes, until the reader goes, is too
// slow, or the broker stops. A reader resumes from the last seq it has.
func (h *HostHandler) events(x *exchange) (reply, error) {
	q, err := eventQuery(x.query)
	p := params{q: x.query, err: err}
	follow := p.flag("follow")
	if p.err != nil {
		return reply{}, p.err
	}
	if follow && q.Limit > 0 {
		return reply{}, &Error{Code: CodeInvalid, Detail: "limit and follow exclude each other"}
	}
	ctx := x.r.Context()
	if !follow {
		if q.Limit == 0 {
			q.Limit = defaultEvents
		}
		events, err := h.svc.Events(ctx, q)
		if err != nil {
			return reply{}, err
		}
		return reply{stream: func(w http.ResponseWriter) error {
			return h.newStream(w).send(events)
		}}, nil
	}
	if h.followers.Add(1) > int64(h.o.MaxFollowers) {
		h.followers.Add(-1)
		return reply{}, &Error{Code: CodeUnavailable, Detail: "too many event streams are open", RetryAfter: 5}
	}
	return reply{stream: func(w http.ResponseWriter) error {
		defer h.followers.Add(-1)
		return h.follow(ctx, w, q)
	}}, nil
}

// follow pages through the log and sleeps at its end until the next commit.
func (h *HostHandler) follow(ctx context.Context, w http.ResponseWriter, q EventQuery) error {
	ctx, cancel := untilStopping(ctx)
	defer cancel()
	wake := h.svc.EventsWake(ctx)
	out := h.newStream(w)
	q.Limit = defaultEvents
	for {
		events, err := h.svc.Events(ctx, q)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		if err := out.send(events); err != nil {
			return err
		}
		if n := len(events); n > 0 {
			q.After = events[n-1].Seq
		}
		if len(events) == q.Limit {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-wake:
			if !open {
				return nil
			}
		}
	}
}

type stream struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	slow time.Duration
}

// newStream sends the header at once, so that a reader knows it is connected
// before there is an event.
func (h *HostHandler) newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", mediaNDJSON)
	w.Header().Set("Cache-Control", "no-store")
	return &stream{w: w, rc: http.NewResponseController(w), slow: h.o.SlowReader}
}

// send writes and flushes; a reader that leaves no room for too long is an
// error.
func (s *stream) send(events []Event) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	for i := range events {
		if err := enc.Encode(&events[i]); err != nil {
			return err
		}
		if buf.Len() < 64<<10 && i < len(events)-1 {
			continue
		}
		_ = s.rc.SetWriteDeadline(time.Now().Add(s.slow))
		if _, err := s.w.Write(buf.Bytes()); err != nil {
			return err
		}
		buf.Reset()
	}
	_ = s.rc.SetWriteDeadline(time.Now().Add(s.slow))
	return s.rc.Flush()
}

// audit is one page of the log as a JSON document.
func (h *HostHandler) audit(x *exchange) (reply, error) {
	q, err := eventQuery(x.query)
	if err != nil {
		return reply{}, err
	}
	if q.Limit == 0 {
		q.Limit = defaultEvents
	}
	limit := q.Limit
	q.Limit++ // one more tells whether there is more
	events, err := h.svc.Events(x.r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	list := EventList{Events: present(events), Next: q.After}
	if len(events) > limit {
		list.Events, list.More = events[:limit], true
	}
	if n := len(list.Events); n > 0 {
		list.Next = list.Events[n-1].Seq
	}
	return ok(list)
}
