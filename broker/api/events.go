package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"slices"
	"sync/atomic"
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
		first, err := h.svc.Events(ctx, q)
		if err != nil {
			return reply{}, err
		}
		return reply{stream: func(w http.ResponseWriter) error {
			return h.upTo(ctx, h.newStream(w), q, first)
		}}, nil
	}
	q.Limit = defaultEvents
	ctx, cancel := untilStopping(ctx)
	wake := h.svc.EventsWake(ctx)
	// What is wrong with the query is told before the stream begins.
	first, err := h.svc.Events(ctx, q)
	if err == nil && h.o.Streams.open.Add(1) > int64(h.o.MaxFollowers) {
		h.o.Streams.open.Add(-1)
		err = &Error{Code: CodeUnavailable, Detail: "too many event streams are open", RetryAfter: 5}
	}
	if err != nil {
		cancel()
		return reply{}, err
	}
	return reply{stream: func(w http.ResponseWriter) error {
		defer h.o.Streams.open.Add(-1)
		defer cancel()
		return h.follow(ctx, h.newStream(w), wake, q, first)
	}}, nil
}

// upTo sends pages until there are q.Limit events, or no more.
func (h *HostHandler) upTo(ctx context.Context, out *stream, q EventQuery, page EventList) error {
	for {
		if err := out.send(page.Events); err != nil {
			return err
		}
		q.Limit -= len(page.Events)
		if q.Limit <= 0 || !page.More {
			return nil
		}
		var err error
		q.After = page.Next
		if page, err = h.svc.Events(ctx, q); err != nil {
			return err
		}
	}
}

// follow pages through the log and sleeps at its end until the next commit.
func (h *HostHandler) follow(ctx context.Context, out *stream, wake <-chan struct{}, q EventQuery, page EventList) error {
	for {
		if err := out.send(page.Events); err != nil {
			return err
		}
		q.After = page.Next
		if !page.More {
			select {
			case <-ctx.Done():
				return nil
			case _, open := <-wake:
				if !open {
					return nil
				}
			}
		}
		var err error
		page, err = h.svc.Events(ctx, q)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
	}
}

// StreamStats count event streams. The zero value is ready to use.
type StreamStats struct{ open, cut atomic.Int64 }

// Open is how many are followed now.
func (s *StreamStats) Open() int64 { return s.open.Load() }

// Cut is how many were cut off since the start because their reader was too slow.
func (s *StreamStats) Cut() int64 { return s.cut.Load() }

type stream struct {
	w     http.ResponseWriter
	rc    *http.ResponseController
	slow  time.Duration
	stats *StreamStats
}

// newStream sends the header at once, so that a reader knows it is connected
// before there is an event.
func (h *HostHandler) newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", mediaNDJSON)
	w.Header().Set("Cache-Control", "no-store")
	return &stream{w: w, rc: http.NewResponseController(w), slow: h.o.SlowReader, stats: h.o.Streams}
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
			return s.failed(err)
		}
		buf.Reset()
	}
	_ = s.rc.SetWriteDeadline(time.Now().Add(s.slow))
	return s.failed(s.rc.Flush())
}

// failed counts a reader that was cut off because it was too slow.
func (s *stream) failed(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.stats.cut.Add(1)
	}
	return err
}

// audit is one page of the log as a JSON document.
func (h *HostHandler) audit(x *exchange) (reply, error) {
	q, err := eventQuery(x.query)
	if err != nil {
		return reply{}, err
	}
	p := params{q: x.query}
	if q.Records = p.flag("records"); p.err != nil {
		return reply{}, p.err
	}
	if q.Limit == 0 {
		q.Limit = defaultEvents
	}
	list, err := h.svc.Events(x.r.Context(), q)
	if err != nil {
		return reply{}, err
	}
	list.Events = present(list.Events)
	return ok(list)
}

// Decisions are the outcomes that DecisionOf tells apart.
var Decisions = []string{string(OutcomeAllow), string(OutcomeDeny), string(OutcomeAsk), string(OutcomeError)}

// DecisionOf is the outcome of the decision on record in the data of
// grant.requested or grant.denied, or "" where the event is no other. It is "error"
// where an engine could not decide, and "deny" where a request was refused
// before policy was asked.
func DecisionOf(eventType string, data json.RawMessage) string {
	var verdict *Verdict
	switch eventType {
	case "grant.requested":
		var d struct {
			Decision struct {
				Verdict *Verdict `json:"verdict"`
			} `json:"decision"`
		}
		_ = json.Unmarshal(data, &d) // nothing is on record then
		verdict = d.Decision.Verdict
	case "grant.denied":
		var d struct {
			Decision *Verdict `json:"decision"`
		}
		_ = json.Unmarshal(data, &d)
		if verdict = d.Decision; verdict == nil {
			return string(OutcomeDeny)
		}
	}
	switch {
	case verdict == nil:
		return ""
	case slices.ContainsFunc(verdict.Answers, func(a Answer) bool { return a.Outcome == OutcomeError }):
		return string(OutcomeError)
	}
	return string(verdict.Outcome)
}
