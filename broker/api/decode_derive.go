package api

import (
	"fmt"

	"github.com/google/uuid"
)

// maxCount bounds the counted limits of a grant.
const maxCount = 1 << 20

func (r *GuestDelegation) validate() error {
	if (r.Grant == "") == (r.Token == "") {
		return fmt.Errorf("give exactly one of grant and token")
	}
	return firstError(
		checkUUID("grant", r.Grant),
		checkToken("token", r.Token),
		checkNeeded("to", r.To, maxRef),
		checkUUID("to", r.To),
		checkLength("capability", r.Capability, maxSpelling),
		checkTTL(r.TTLSeconds),
		checkCount("max_uses", r.MaxUses, 1),
		checkCount("max_depth", r.MaxDepth, 0),
		checkLabel("label", r.Label),
	)
}

// checkDerived is checkSpelling for what may be absent where there is a parent.
func checkDerived(field, s string, derived bool) error {
	if s == "" && derived {
		return nil
	}
	return checkSpelling(field, s)
}

func checkCount(field string, n *int, least int) error {
	if n != nil && (*n < least || *n > maxCount) {
		return fmt.Errorf("%s must be between %d and %d", field, least, maxCount)
	}
	return nil
}

// checkUUID takes a UUID in its one canonical spelling.
func checkUUID(field, s string) error {
	if s == "" {
		return nil
	}
	if id, err := uuid.Parse(s); err != nil || id == uuid.Nil || id.String() != s {
		return fmt.Errorf("%s is not a UUID in lower case with dashes", field)
	}
	return nil
}
