package capabilities

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// ErrUnknownPartition is returned where a spelling names a partition that
// there is nobody to ask about. A Resolver's own errors are passed on.
var ErrUnknownPartition = errors.New("unknown partition")

// uuidLength is that of the canonical form; uuid.Parse takes others too.
const uuidLength = 36

// resolvePartition reads a partition as a person writes it. A UUID needs no
// Resolver, and no name can stand in its way.
func resolvePartition(text string, r Resolver) (uuid.UUID, error) {
	if len(text) == uuidLength {
		if id, err := uuid.Parse(text); err == nil {
			return id, nil
		}
	}
	if text == "" {
		return uuid.Nil, fmt.Errorf("%w: names no partition", ErrSpelling)
	}
	if r == nil {
		return uuid.Nil, fmt.Errorf("%w: %s", ErrUnknownPartition, excerpt(text))
	}
	id, err := r.Partition(text)
	if err != nil {
		return uuid.Nil, err
	}
	return id, nil
}

// canonicalUUID reads the one form that encodings use.
func canonicalUUID(text string) (uuid.UUID, bool) {
	id, err := uuid.Parse(text)
	return id, err == nil && len(text) == uuidLength && id.String() == text
}
