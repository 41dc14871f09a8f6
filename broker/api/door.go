package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// door is what both servers have in common: it bounds, reads, routes, admits
// and answers. Only its table and its bounds differ.
type door struct {
	name         string
	routes       []route
	log          *slog.Logger
	caller       func(*http.Request) (Caller, bool)
	problem      func(err error, rt *route) Problem
	keys         *idempotency
	limiter      *rate.Limiter // nil: none
	maxBody      int64
	bodyTimeout  time.Duration // for a body to arrive
	writeTimeout time.Duration // for a client to take an answer
	callTimeout  time.Duration // for the service to answer; zero: the client's patience
}

// answer is a whole response, as it is sent and as it is remembered.
type answer struct {
	status      int
	contentType string
	location    string
	allow       string
	retryAfter  int
	body        []byte
}

func (d *door) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	// Until the body is in, the connection has a deadline; it stays on every
	// path that leaves without having read the body, so that the server's
	// own draining of the rest ends too.
	_ = rc.SetReadDeadline(time.Now().Add(d.bodyTimeout))
	_ = rc.SetWriteDeadline(time.Now().Add(d.writeTimeout))
	rt, params, allow := find(d.routes, r.Method, r.URL.EscapedPath())
	if d.limiter != nil && !d.limiter.Allow() {
		d.fail(w, r, rt, &Error{Code: CodeRateLimited, RetryAfter: 1})
		return
	}
	body, err := readBody(w, r, d.maxBody)
	if err != nil {
		w.Header().Set("Connection", "close")
		d.fail(w, r, rt, err)
		return
	}
	_ = rc.SetReadDeadline(time.Time{})
	switch {
	case rt == nil && allow != nil:
		a := answerProblem(d.problem(&Error{Code: CodeMethodNotAllowed, Detail: "use " + strings.Join(allow, ", ")}, nil))
		a.allow = strings.Join(allow, ", ")
		d.send(w, a)
		return
	case rt == nil:
		d.fail(w, r, nil, &Error{Code: CodeNotFound, Detail: "there is no such route"})
		return
	}
	x := &exchange{w: w, r: r, params: params, body: body}
	if err := d.admit(x, rt); err != nil {
		d.fail(w, r, rt, err)
		return
	}
	if key := r.Header.Values("Idempotency-Key"); rt.changes() && len(key) > 0 {
		d.once(x, rt, key)
		return
	}
	d.call(x, rt, r.Context())
}

// admit checks everything about a request that its row fixes.
func (d *door) admit(x *exchange, rt *route) error {
	caller, known := d.caller(x.r)
	if err := rt.rule.admit(caller, known); err != nil {
		return err
	}
	x.caller = caller
	q, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return &Error{Code: CodeInvalid, Detail: "the query is malformed"}
	}
	for name := range q {
		if !slices.Contains(rt.query, name) {
			return Errorf(CodeInvalid, "unknown query parameter %q", clip(name))
		}
	}
	x.query = q
	for name, value := range x.params {
		if err := checkText(name, value, maxRef); err != nil {
			return &Error{Code: CodeInvalid, Detail: err.Error()}
		}
	}
	switch {
	case len(x.body) == 0 && rt.body == needBody:
		return &Error{Code: CodeInvalid, Detail: "the body is missing"}
	case len(x.body) > 0 && rt.body == noBody:
		return &Error{Code: CodeInvalid, Detail: "this route takes no body"}
	case len(x.body) > 0:
		if media, _, err := mime.ParseMediaType(x.r.Header.Get("Content-Type")); err != nil || media != mediaJSON {
			return &Error{Code: CodeUnsupportedMedia, Detail: "send the body as " + mediaJSON}
		}
	}
	return nil
}

// call runs a handler and sends what it answers.
func (d *door) call(x *exchange, rt *route, ctx context.Context) {
	rep, err := d.run(x, rt, ctx)
	switch {
	case err != nil:
		d.fail(x.w, x.r, rt, err)
	case rep.upgrade != nil:
		d.join(x, rep.upgrade)
	case rep.stream != nil:
		if err := rep.stream(x.w); err != nil {
			d.log.InfoContext(ctx, "stream ended early", "api", d.name, "route", rt.path, "error", err)
			// The client must not take what it has for the whole.
			panic(http.ErrAbortHandler)
		}
	default:
		d.send(x.w, d.render(x.r, rt, rep))
	}
}

func (d *door) run(x *exchange, rt *route, ctx context.Context) (reply, error) {
	if d.callTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.callTimeout)
		defer cancel()
	}
	x.r = x.r.WithContext(ctx)
	return rt.handle(x)
}

// once is call for a request with an Idempotency-Key. The work goes on when
// the client goes, because the client may come back for its answer.
func (d *door) once(x *exchange, rt *route, key []string) {
	if len(key) != 1 || !validKey(key[0]) {
		d.fail(x.w, x.r, rt, &Error{Code: CodeInvalid, Detail: "the Idempotency-Key must be one of 1 to 255 visible ASCII characters"})
		return
	}
	scoped := strconv.FormatUint(uint64(x.caller.UID), 10) + "/" + key[0]
	claim, earlier, err := d.keys.begin(x.r.Context(), scoped, fingerprint(x.r, x.body))
	switch {
	case err != nil:
		d.fail(x.w, x.r, rt, err)
		return
	case earlier != nil:
		x.w.Header().Set("Idempotency-Replayed", "true")
		d.send(x.w, earlier)
		return
	}
	var ans *answer
	func() {
		defer func() { d.keys.finish(claim, ans) }()
		ctx, cancel := detach(x.r.Context())
		defer cancel()
		rep, err := d.run(x, rt, ctx)
		if err != nil {
			ans = d.renderError(x.r, rt, err)
			return
		}
		ans = d.render(x.r, rt, rep)
	}()
	d.send(x.w, ans)
}

func (d *door) render(r *http.Request, rt *route, rep reply) *answer {
	if rep.body == nil {
		return &answer{status: rep.status}
	}
	b, err := json.Marshal(rep.body)
	if err != nil {
		return d.renderError(r, rt, err)
	}
	return &answer{status: rep.status, contentType: mediaJSON, location: rep.location, body: append(b, '\n')}
}

// renderError makes the problem document of err and logs its cause.
func (d *door) renderError(r *http.Request, rt *route, err error) *answer {
	p := d.problem(err, rt)
	level := slog.LevelDebug
	switch {
	case asError(err).Code == CodeInternal:
		level = slog.LevelError
	case asError(err).Unwrap() != nil:
		level = slog.LevelInfo
	}
	path := ""
	if rt != nil {
		path = rt.path
	}
	d.log.Log(r.Context(), level, "request failed", "api", d.name, "method", r.Method, "route", path,
		"code", asError(err).Code, "instance", p.Instance, "error", err, "cause", asError(err).Unwrap())
	return answerProblem(p)
}

func (d *door) fail(w http.ResponseWriter, r *http.Request, rt *route, err error) {
	d.send(w, d.renderError(r, rt, err))
}

func (d *door) send(w http.ResponseWriter, a *answer) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d.writeTimeout))
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	if a.location != "" {
		h.Set("Location", a.location)
	}
	if a.allow != "" {
		h.Set("Allow", a.allow)
	}
	if a.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(a.retryAfter))
	}
	if a.contentType != "" {
		h.Set("Content-Type", a.contentType)
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	_, _ = io.Copy(w, bytes.NewReader(a.body))
}

// readBody reads a whole body of at most limit bytes.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	if r.ContentLength > limit {
		return nil, Errorf(CodeTooLarge, "the body is over %d bytes", limit)
	}
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		if _, over := errors.AsType[*http.MaxBytesError](err); over {
			return nil, Errorf(CodeTooLarge, "the body is over %d bytes", limit)
		}
		return nil, (&Error{Code: CodeInvalid, Detail: "the body is malformed or did not arrive in time"}).WithCause(err)
	}
	return b, nil
}
