package api

import (
	"container/list"
	"context"
	"crypto/sha256"
	"net/http"
	"sync"
	"time"
)

// idempotency remembers the answers to changing requests that carried an
// Idempotency-Key, so that a client that lost an answer may ask again. It is
// bounded in entries, bytes and time and lives in memory only: a restarted
// broker has forgotten, and the ledger tells what was done.
type idempotency struct {
	maxEntries int
	maxBytes   int
	ttl        time.Duration
	now        func() time.Time

	mu      sync.Mutex
	entries map[string]*keyed
	oldest  *list.List // of *keyed, finished ones only, oldest first
	bytes   int
}

type keyed struct {
	key   string
	print [sha256.Size]byte
	done  chan struct{} // closed when ans is set or the key is forgotten
	ans   *answer
	at    time.Time
	elem  *list.Element
}

func newIdempotency(maxEntries, maxBytes int, ttl time.Duration) *idempotency {
	return &idempotency{
		maxEntries: maxEntries, maxBytes: maxBytes, ttl: ttl, now: time.Now,
		entries: map[string]*keyed{}, oldest: list.New(),
	}
}

// begin claims key for the request with this fingerprint. It returns a claim,
// which must be given to finish, or the answer that an earlier request got.
// While that one is being worked on, begin waits.
func (s *idempotency) begin(ctx context.Context, key string, print [sha256.Size]byte) (*keyed, *answer, error) {
	for {
		s.mu.Lock()
		s.expire()
		k, ok := s.entries[key]
		if !ok {
			if len(s.entries) >= s.maxEntries && !s.evict() {
				s.mu.Unlock()
				return nil, nil, &Error{Code: CodeUnavailable, Detail: "too many requests with an Idempotency-Key are under way", RetryAfter: 1}
			}
			k = &keyed{key: key, print: print, done: make(chan struct{})}
			s.entries[key] = k
			s.mu.Unlock()
			return k, nil, nil
		}
		if k.print != print {
			s.mu.Unlock()
			return nil, nil, &Error{Code: CodeKeyReused, Detail: "the Idempotency-Key came with another request before"}
		}
		ans := k.ans
		s.mu.Unlock()
		if ans != nil {
			return nil, ans, nil
		}
		select {
		case <-k.done:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// finish records the answer of a claim, or forgets the key when ans is nil or
// says that nothing was done.
func (s *idempotency) finish(k *keyed, ans *answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(k.done)
	if ans == nil || ans.status == http.StatusServiceUnavailable || ans.status == http.StatusTooManyRequests || len(ans.body) > s.maxBytes {
		delete(s.entries, k.key)
		return
	}
	for s.bytes+len(ans.body) > s.maxBytes && s.evict() {
	}
	k.ans, k.at = ans, s.now()
	k.elem = s.oldest.PushBack(k)
	s.bytes += len(ans.body)
}

func (s *idempotency) expire() {
	for e := s.oldest.Front(); e != nil; e = s.oldest.Front() {
		if s.now().Sub(e.Value.(*keyed).at) < s.ttl {
			return
		}
		s.evict()
	}
}

// evict forgets the oldest finished entry, if there is one.
func (s *idempotency) evict() bool {
	e := s.oldest.Front()
	if e == nil {
		return false
	}
	k := s.oldest.Remove(e).(*keyed)
	delete(s.entries, k.key)
	s.bytes -= len(k.ans.body)
	return true
}

// validKey says whether s may be an Idempotency-Key: 1 to 255 visible ASCII
// characters.
func validKey(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// fingerprint identifies a request's content.
func fingerprint(r *http.Request, body []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write([]byte(r.Method + "\n" + r.URL.EscapedPath() + "\n" + r.URL.RawQuery + "\n"))
	h.Write(body)
	return [sha256.Size]byte(h.Sum(nil))
}
